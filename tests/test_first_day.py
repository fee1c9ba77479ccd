"""From a folder to a run: `init` writes a config, a check accepts it, and a run learns from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from detkernel.config import load
from detkernel.loop import Kernel
from detkernel_data.shapes import Shapes
from detkernel_data.starting.command import init
from PIL import Image

SHORT = ["run.until=2 iters", "run.validate=every 2 iters", "data.workers=0", "device.device=cpu", "data.batch_size=2"]


def _kernel(config: str, *overrides: str) -> Kernel:
    loaded = load(config, [*SHORT, *overrides])
    return Kernel(loaded.plugins, loaded.options, priorities=loaded.priorities, config=loaded.plain)


def _labelled(folder: Path, count: int) -> None:
    """Drawn shapes as images with labels of YOLO's form beside them."""
    data = Shapes(size=count, side=96, sizes=(24, 60))
    data.load()
    folder.mkdir()
    for index in range(count):
        notes = data.annotations(index)
        Image.fromarray(data.image(index).permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
        lines = [
            f"{label} {(x1 + x2) / 192} {(y1 + y2) / 192} {(x2 - x1) / 96} {(y2 - y1) / 96}\n"
            for label, (x1, y1, x2, y2) in zip(notes.labels, notes.boxes.tolist(), strict=True)
        ]
        (folder / f"{index}.txt").write_text("".join(lines))


def test_a_folder_becomes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _labelled(tmp_path / "mine", 8)
    result = CliRunner().invoke(init, ["mine"], catch_exceptions=False)
    assert "next: detkernel check mine.yaml && detkernel run mine.yaml" in result.output
    assert "not installed" not in result.output
    lines = _kernel("mine.yaml").check(fast=False)
    assert "6 images, all decoded" in lines["train"]
    run = _kernel("mine.yaml").run()
    assert "coco/bbox_mAP" in run.metrics
    assert (tmp_path / "runs/mine/checkpoints").is_dir()
