"""Plugins beside each other: checkpoints, guards and devices with the optimizers, averages and logs of others."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import CheckpointError, Run, Span, UserError, hookimpl, option, plugin
from detkernel_checkpoint import checkpoint_file
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loading.loader import Loader
from detkernel_detection import Losses
from detkernel_detection.testing import TinyDataset, tiny_kernel, tiny_run
from detkernel_detectors.backbones import Cspnext, Resnet
from detkernel_detectors.heads import FcBoxHead, LevelTowers
from detkernel_detectors.models.dino import Dino
from detkernel_detectors.models.faster_rcnn import FasterRcnn
from detkernel_detectors.models.rtmdet import Rtmdet
from detkernel_detectors.necks import ChannelMapper, CspPafpn, Fpn
from detkernel_evaluation.coco import CocoMap
from detkernel_evaluation.voc import VocMap
from detkernel_guards.check_invalid_loss import CheckInvalidLoss
from detkernel_guards.early_stopping import EarlyStopping
from detkernel_logging.log import Log
from detkernel_optim.ema import Ema
from detkernel_optim.schedules import Cosine, Multistep
from detkernel_optim.stepping import Adamw, Group, Sgd
from detkernel_runtime.device import Device


def names(work_dir: Path) -> list[str]:
    return sorted(path.name for path in (work_dir / "checkpoints").glob("*iter_*.pt"))


@plugin
class BreakLoss:
    """Makes the loss of one iteration invalid."""

    at: int = option(help="iteration")

    @hookimpl(wrapper=True)
    def train_step(self, run: Run) -> Generator[None, Losses, Losses]:
        losses = yield
        return {name: loss * float("nan") if run.iter + 1 == self.at else loss for name, loss in losses.items()}


@plugin
class NoStep:
    """Takes the place of the optimizer, so that an invalid loss breaks nothing that could be seen later."""


@pytest.mark.parametrize(
    ("name", "more", "since"),
    [("checkpoint", Checkpoint(every=Span(5, "iters")), 3), ("log", Log(interval=6, sinks=[]), 4)],
)
def test_no_loss_is_passed_over_where_others_act_on_it(tmp_path: Path, name: str, more: Any, since: int):
    plugins = {"break": BreakLoss(at=3), "check": CheckInvalidLoss(interval=1000), "optimizer": NoStep(), name: more}
    with pytest.raises(UserError, match=rf"iteration 3: .*loss_bbox is nan.* {since} iterations went on with it"):
        tiny_run(plugins, until="40 iters", work_dir=tmp_path)


def test_steps_that_are_left_out_stop_nothing(tmp_path: Path):
    plugins = {
        "break": BreakLoss(at=3),
        "check": CheckInvalidLoss(interval=1),
        "optimizer": Sgd(lr=0.01, invalid_gradients="skip"),
    }
    run = tiny_run(plugins, until="6 iters", work_dir=tmp_path)
    assert (run.iter, run.scalars["skipped_steps"]()) == (6, 1.0)
    assert all(bool(value.isfinite().all()) for value in run.model.state_dict().values())


def test_a_run_that_goes_on_has_no_first_iteration(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    @plugin
    class Zero:
        """Gives a loss that has become 0."""

        @hookimpl(wrapper=True)
        def train_step(self):
            losses = yield
            return {**losses, "loss_done": torch.tensor(0.0)}

    def start(until: str) -> None:
        plugins = {"zero": Zero(), "check": CheckInvalidLoss(interval=1, constant=3), "checkpoint": Checkpoint()}
        tiny_run(plugins, until=until, work_dir=tmp_path)

    start("2 iters")
    start("6 iters")
    assert "has been exactly" not in caplog.text


def test_a_frozen_model_is_tested_with_all_that_a_training_has(tmp_path: Path):
    @plugin
    class Freeze:
        """Freezes everything."""

        @hookimpl
        def prepare_model(self, run: Run) -> None:
            run.model.requires_grad_(False)

    plugins = {
        "device": Device(precision="bf16"),
        "freeze": Freeze(),
        "optimizer": Sgd(lr=0.1),
        "schedule": Multistep(milestones=[Span(2, "epochs")], warmup=Span(500, "iters")),
        "ema": Ema(),
    }
    assert tiny_kernel(plugins, work_dir=tmp_path).test().mode == "test"


def test_the_rate_that_is_logged_after_a_resume_is_that_of_the_steps(tmp_path: Path):
    def plugins() -> dict[str, Any]:
        optimizer = Sgd(lr=0.5, groups=[Group(match="3.*", lr_mult=0.1)])
        return {"checkpoint": Checkpoint(), "optimizer": optimizer, "schedule": Cosine()}

    tiny_run(plugins(), until="4 iters", work_dir=tmp_path)
    run = tiny_run(plugins(), until="8 iters", work_dir=tmp_path)
    rates = sorted(group["lr"] for group in run.optimizer.param_groups)
    assert sorted(run.scalars[name]() for name in run.scalars if name.startswith("lr")) == rates
    assert 0 < rates[0] < rates[1] < 0.05


def test_a_broken_average_is_not_written(tmp_path: Path):
    @plugin
    class BreakAverage:
        """The average alone is NaN; the weights in training are valid."""

        @hookimpl
        def after_train_iter(self, run: Run) -> None:
            if run.iter == 3:
                run.bus["ema"]._averages._averages[0][0] = float("nan")  # type: ignore[attr-defined]

    plugins = {"optimizer": Sgd(lr=1e-3), "ema": Ema(), "break": BreakAverage(), "checkpoint": Checkpoint(every=None)}
    with pytest.raises(CheckpointError, match=r"the state at iteration 4 cannot be trained on: model\.0\.0\.weight is"):
        tiny_run(plugins, until="4 iters", work_dir=tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("every", "kept"), [(Span(2, "iters"), "iter_4.pt"), (Span(1, "epochs"), "iter_4.pt")])
def test_an_invalid_loss_is_seen_before_it_is_saved(tmp_path: Path, every: Span, kept: str):
    plugins = {"break": BreakLoss(at=5), "check": CheckInvalidLoss(), "checkpoint": Checkpoint(every=every)}
    with pytest.raises(UserError, match=r"iteration 5: loss_cls is nan, loss_bbox is nan \(images") as caught:
        tiny_run(plugins, until="20 iters", work_dir=tmp_path)
    since = {"iters": "2 iterations went on with it", "epochs": "4 iterations went on with it"}[every.unit]
    assert since in str(caught.value)
    assert names(tmp_path) == [*(["iter_2.pt"] if every.unit == "iters" else []), kept]
    assert (
        f"{kept}, of iteration 4, run again; {2 if every.unit == 'iters' else 4} iterations after it will run"
        in (caught.value.__notes__[-1])
    )


@plugin(resume_neutral=("*",))
class FailInValidation:
    """Fails in the validation behind an iteration."""

    at: int = option(help="iteration; 0: never")
    event: str = option(default="after_val_iter", help="where")
    interrupted: bool = option(default=False, help="by Ctrl-C")

    def _fail(self, run: Run, event: str) -> None:
        if run.iter == self.at and event == self.event:
            raise (KeyboardInterrupt if self.interrupted else UserError)("a broken image")

    @hookimpl
    def before_val_epoch(self, run: Run) -> None:
        self._fail(run, "before_val_epoch")

    @hookimpl
    def after_val_iter(self, run: Run) -> None:
        torch.rand(3)  # a validation that draws random numbers
        self._fail(run, "after_val_iter")

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        run.metrics.publish("mAP", run.iter % 5, better="higher")
        self._fail(run, "after_val_epoch")


def validated(work_dir: Path, every: Span | None, validate: str, fail: FailInValidation) -> Run:
    plugins = {
        "device": Device(device="cpu"),
        "optimizer": Sgd(lr=1e-2),
        "ema": Ema(ramp=2),
        "fail": fail,
        "checkpoint": Checkpoint(every=every, best="mAP"),
    }
    return tiny_run(plugins, until="3 epochs", validate=validate, work_dir=work_dir)


@pytest.mark.parametrize(
    ("every", "validate", "at"),
    [
        (Span(1, "epochs"), "1 epoch", 8),
        (Span(1, "epochs"), "1 epoch", 12),
        (Span(2, "epochs"), "1 epoch", 4),  # no save is due: the copy from before the validation is written
        (None, "1 epoch", 12),
        (None, "3 iters", 6),
        (Span(4, "iters"), "2 iters", 6),
    ],
)
@pytest.mark.parametrize("event", ["before_val_epoch", "after_val_iter", "after_val_epoch"])
def test_a_validation_that_fails_costs_nothing(tmp_path: Path, every: Span | None, validate: str, at: int, event: str):
    undisturbed = validated(tmp_path / "undisturbed", every, validate, FailInValidation(at=0))
    fail = FailInValidation(at=at, event=event, interrupted=event == "after_val_iter")
    with pytest.raises((UserError, KeyboardInterrupt), match="a broken image") as caught:
        validated(tmp_path / "failed", every, validate, fail)
    assert f"iter_{at}.pt, of iteration {at}, run again" in caught.value.__notes__[-1]
    assert checkpoint_file.read(tmp_path / "failed" / "checkpoints" / f"iter_{at}.pt")["position"]["validated"] < at
    run = validated(tmp_path / "failed", every, validate, FailInValidation(at=0))
    assert run.state_dict() == undisturbed.state_dict()
    for name, weight in undisturbed.model.state_dict().items():
        assert torch.equal(weight, run.model.state_dict()[name])


def sets(*names: str, seed: int = 3) -> dict[str, TinyDataset]:
    return {name: TinyDataset(size=6, seed=seed + number) for number, name in enumerate(names)}


def with_sets(folder: Path, until: str = "12 iters", **plugins: Any) -> Any:
    """Validated on `val` and `night`, by two evaluators; the best is by `night`."""
    data = Loader(train=TinyDataset(size=8), val=TinyDataset(size=4, seed=1), further_val=sets("night"), workers=0)
    standard = {
        "device": Device(device="cpu"),
        "data": data,
        "coco": CocoMap(save=Path("found.json")),
        "voc": VocMap(sets=("night",), per_class=False),
        "checkpoint": Checkpoint(best="night/coco/bbox_mAP"),
        "stop": EarlyStopping(metric="night/pascal_voc/mAP", patience=3),
    }
    active = {name: part for name, part in {**standard, **plugins}.items() if part is not None}
    return tiny_kernel(active, until=until, validate="2 iters", work_dir=folder)


def test_validation_sets_have_metrics_of_their_own_that_others_choose_by(tmp_path: Path):
    run = with_sets(tmp_path / "both").run()
    measured = {name.rsplit("/", 1)[0] for name in run.metrics}
    assert measured == {"coco", "night/coco", "night/pascal_voc"}
    alone = Loader(train=TinyDataset(size=8), val=TinyDataset(size=6, seed=3), workers=0)
    by_itself = with_sets(
        tmp_path / "alone", data=alone, voc=VocMap(per_class=False), checkpoint=Checkpoint(),
        stop=EarlyStopping(metric="pascal_voc/mAP", patience=3),
    ).run()  # fmt: skip
    assert {f"night/{name}": str(value) for name, value in by_itself.metrics.items()} == {
        name: str(value) for name, value in run.metrics.items() if name.startswith("night/")
    }
    assert run.stop_reason == str(by_itself.stop_reason).replace("pascal", "night/pascal")
    [best] = [name for name in names(tmp_path / "both") if "best" in name]
    history = dict(run.metrics.history("night/coco/bbox_mAP"))
    assert best == f"best_iter_{max(history, key=lambda at: history[at])}.pt"
    assert {path.name for path in (tmp_path / "both").glob("found*")} == {"found.json", "found.night.json"}


def test_a_run_with_validation_sets_resumes_bit_for_bit_and_is_tested_and_checked_on_all(tmp_path: Path):
    whole = with_sets(tmp_path / "whole", until="6 iters").run()
    with_sets(tmp_path / "parts", until="4 iters").run()
    run = with_sets(tmp_path / "parts", until="6 iters").run()
    assert str(run.state_dict()) == str(whole.state_dict())
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, run.model.state_dict()[name])
    tested = with_sets(tmp_path / "parts").test()
    assert {name: str(value) for name, value in tested.metrics.items()} == {
        name: str(value) for name, value in run.metrics.items()
    }
    lines = with_sets(tmp_path / "parts").check()
    assert lines["night"].startswith("6 images, all decoded, 6 boxes, 0 images without a box, 3 batches")
    assert "night" in lines["boxes by class"]


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ({"voc": VocMap(sets=("nigth",))}, "sets: no validation set is named 'nigth', did you mean 'night'?"),
        ({"voc": VocMap(sets=("val", "dawn"))}, "is named 'dawn' (expected one of: night, val)"),
        ({"voc": CocoMap(sets=("night",))}, "'coco' names its metrics of night 'coco/...' too; give one of them"),
        ({"voc": VocMap(prefix="coco")}, "prefix: 'coco' names its metrics of val 'coco/...' too"),
        ({"coco": None, "voc": VocMap(sets=("val",))}, "no evaluator measures the validation set 'night'; add it"),
        ({"data": Loader(train=TinyDataset(), val=TinyDataset(), further_val=sets("val"))}, "'val': a loader has this"),
        ({"data": Loader(train=TinyDataset(), val=TinyDataset(), further_val=sets("a/b"))}, "the name 'a/b': expected"),
        ({"data": Loader(train=TinyDataset(), further_val=sets("night"))}, "there is no `val`, which these are beside"),
    ],
)
def test_mistakes_with_validation_sets_are_told_before_data_is_loaded(
    tmp_path: Path, plugins: dict[str, Any], message: str
):
    kernel = with_sets(tmp_path, **plugins)
    with pytest.raises(UserError) as caught:
        kernel.run()
    assert message in str(caught.value)
    assert not kernel.state.loaders


def native(name: str) -> Any:
    """A small native detector whose iterations draw by chance, or count something."""
    small = Resnet(depth=18, channels=4, norm="batch")
    detr: Any = {"queries": 8, "encoder_layers": 1, "decoder_layers": 2, "attention_heads": 4, "ffn_channels": 16}
    if name == "faster_rcnn":
        neck = Fpn(channels=16, finest=4, extra=1, extra_from="pool")
        return FasterRcnn(backbone=small, neck=neck, box_head=FcBoxHead(channels=16), sampled=8, proposals_train=40)
    if name == "dino":
        return Dino(backbone=small, neck=ChannelMapper(channels=16, groups=4, extra=0), points=2, denoising=4, **detr)
    return Rtmdet(
        backbone=Cspnext(depth=0.33, width=0.125),
        neck=CspPafpn(channels=16, blocks=1),
        head=LevelTowers(convs=1, channels=16),
        max_detections=100,
    )


@pytest.mark.parametrize("name", ["faster_rcnn", "dino", "rtmdet"])
def test_native_detectors_resume_bit_for_bit(tmp_path: Path, name: str):
    def run(folder: str, until: str) -> Run:
        data = Loader(train=TinyDataset(size=8, side=64), workers=0)
        plugins = {"device": Device(device="cpu"), "data": data, "model": native(name), "ema": Ema()}
        more = {
            "optimizer": Adamw(lr=1e-3, clip_norm=1.0),
            "checkpoint": Checkpoint(),
            "log": Log(interval=1, sinks=[]),
        }
        return tiny_kernel({**plugins, **more}, until=until, work_dir=tmp_path / folder).run()

    whole = run("whole", "5 iters")
    run("parts", "2 iters")
    resumed = run("parts", "5 iters")
    assert str(resumed.state_dict()) == str(whole.state_dict())
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[key]), key
