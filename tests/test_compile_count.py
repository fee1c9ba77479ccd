"""How often a native detector is compiled where images have many sizes: at most once a shape of its batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import hookimpl, plugin, state
from detkernel.config import load
from detkernel.loop import Kernel

CONFIG = """
run: {until: 14 iters, work_dir: work}
device: {device: cpu, compile: {backend: counts, limit: 99}}
data:
  use: loader
  train: {use: shapes, size: 24, side: 96, sizes: [12, 40]}
  train_transforms: [{use: resize, short: [32, 40, 48, 56, 64], long: 64}, flip]
  batch_shapes: [[32, 32], [64, 64]]
  batch_size: 2
  drop_last: true
  workers: 0
model:
  use: MODEL
  backbone: {use: resnet, depth: 18, channels: 8, stages: 1}
  neck: {use: fpn, channels: 8, finest: 4, extra: 0}
  head: {use: towers, convs: 0}
optimizer: {use: sgd, lr: 1e-4}
"""
LONG = "DETKERNEL_LONG" in os.environ
"""Under `tox -e torture`: more families."""
seen: list[tuple[int, ...]] = []


@plugin
class Sizes:
    """The sizes of images and batches that a run has met."""

    images: set[tuple[int, int]] = state(factory=set)
    batches: set[tuple[int, ...]] = state(factory=set)

    @hookimpl
    def before_train_iter(self, batch: Any) -> None:
        self.images |= set(batch.sizes)
        self.batches.add(tuple(batch.images.shape))


def counts(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
    """A compiler that keeps the images' shape that each graph is for."""
    seen.append(next(tuple(one.shape) for one in inputs if isinstance(one, torch.Tensor) and one.dtype == torch.uint8))
    made: Callable[..., Any] = graph.forward
    return made


@pytest.mark.parametrize("family", ["retinanet", "atss", "gfl"] if LONG else ["retinanet"])
def test_a_model_is_compiled_once_for_each_shape_of_its_batches(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if "counts" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(counts)
    monkeypatch.chdir(tmp_path)
    seen.clear()
    Path("config.yaml").write_text(CONFIG.replace("MODEL", family))
    loaded, sizes = load("config.yaml"), Sizes()
    try:
        run = Kernel({**loaded.plugins, "sizes": sizes}, loaded.options).run()
    finally:
        torch._dynamo.reset()
    loader: Any = run.loaders["train"]
    assert run.iter == 14
    assert len(sizes.images) >= 4, "of images"
    assert sizes.batches == set(seen) == {(2, 3, 32, 32), (2, 3, 64, 64)}
    assert len(seen) == 2 <= loader.shape_count, "one graph each"
