import math
from pathlib import Path

import pytest
import torch
from deim import FlatCosine, MatchabilityAware
from detkernel import ConfigError, Span, hookimpl, plugin, state
from detkernel.config import load
from detkernel.loop import Kernel
from detkernel_detection.testing import tiny_run
from detkernel_optim.stepping import Sgd

HERE = Path(__file__).parent
SMALL = """
base: BASE
run: {until: 4 epochs, validate: every 1 epoch, work_dir: work}
device: {device: cpu, sync_batchnorm: false}
data:
  train: {use: shapes, size: 4, side: 64}
  val: {use: shapes, size: 2, side: 64}
  train_transforms:
    - {use: mosaic, size: [64, 64], probability: 1.0, active: [1, 3]}
    - {use: color, active: [1, 3]}
    - {use: expand, active: [1, 3]}
    - {use: min_iou_crop, active: [1, 3]}
    - {use: resize, size: [64, 64]}
    - {use: mixup, probability: 1.0, active: [1, 3]}
  batch_transforms: [{use: multi_scale, sizes: [32, 64], every: 1}]
  val_transforms: [{use: resize, size: [64, 64]}]
  batch_size: 2
  workers: 0
model:
  backbone: {use: resnet, depth: 18, channels: 8, weights: null}
  neck: {use: hybrid_encoder, channels: 16, attention_heads: 2, ffn_channels: 16, fusion: elan, depth: 0.34}
  channels: 16
  attention_heads: 2
  ffn_channels: 16
  decoder_layers: 2
  queries: 20
  denoising: 10
schedule: {flat: 2 epochs, last: 1 epochs, warmup: 2 iters}
phases: {changes: [{at: 3 epochs, load_best: true, restart_average: true, transforms_off: [multi_scale]}]}
"""


def test_a_poor_box_counts_as_much_as_a_good_one():
    p = 1 / (1 + math.exp(-2))
    logits = torch.tensor([[0.0, 2.0]], requires_grad=True)
    for quality in (0.1, 0.9):
        loss = MatchabilityAware()(logits, torch.tensor([0]), torch.tensor([quality]))
        assert loss.item() == pytest.approx(math.log(2) - p**1.5 * math.log(1 - p), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([0.5 - 0.9**1.5, p**1.5 * p], rel=1e-5)
    background = MatchabilityAware(gamma=1.0, weight=2.0)(logits[:, 1:], torch.tensor([1]))
    assert background.item() == pytest.approx(-2 * p * math.log(1 - p), rel=1e-5)


def test_the_rate_is_flat_then_a_cosine_then_flat():
    schedule = FlatCosine(flat=Span(20, "iters"), last=Span(10, "iters"), end=0.5)
    factors = [schedule.factor_at(iteration, 100, 10) for iteration in (0, 20, 55, 90, 99)]
    assert factors == pytest.approx([1, 1, 0.75, 0.5, 0.5])
    assert FlatCosine(flat=Span(2, "epochs"), end=0.0).factor_at(60, 100, 10) == pytest.approx(0.5)


def test_a_schedule_without_a_cosine_is_one_clear_line(tmp_path):
    schedule = FlatCosine(flat=Span(6, "iters"), last=Span(2, "iters"))
    with pytest.raises(ConfigError, match="between iterations 6 and 6 of 8"):
        tiny_run({"schedule": schedule, "optimizer": Sgd(lr=0.1)}, until="8 iters", work_dir=tmp_path)


def test_the_recipe():
    plugins = load(HERE / "coco_deim_dfine_l.yaml").plugins
    assert isinstance(plugins["model"].class_loss, MatchabilityAware)
    assert plugins["model"].neck.fusion == "elan"
    active = {type(step).__name__: step.active for step in plugins["data"].train_transforms}
    assert active["Mosaic"] == active["Mixup"] == (4, 29)
    factors = [plugins["schedule"].factor_at(epoch * 100, 5800, 100) for epoch in (29, 50, 57)]
    assert factors == pytest.approx([1, 0.5, 0.5])


@plugin
class Counts:
    """How many objects each batch has."""

    kept: list[int] = state(factory=list)

    @hookimpl
    def after_train_iter(self, batch, losses):
        assert all(loss.isfinite() for loss in losses.values())
        self.kept.append(sum(batch.counts))


def test_a_small_run_of_the_recipe(tmp_path, monkeypatch):
    """Four epochs: more objects an image in the second and the third than in the first and the last."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(SMALL.replace("BASE", str(HERE / "coco_deim_dfine_l.yaml")))
    loaded, counts = load("c.yaml"), Counts()
    plugins = {**loaded.plugins, "counts": counts}
    run = Kernel(plugins, loaded.options, priorities=loaded.priorities, config=loaded.plain).run()
    assert run.iter == len(counts.kept) == 8
    assert sum(counts.kept[2:6]) > 1.5 * sum(counts.kept[:2] + counts.kept[6:])
