"""Phases: what changes in the middle of a run, exactly there, also in a run that was killed and resumed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import CheckpointError, Run, Span, UserError, hookimpl, option, plugin, state
from detkernel.loop import Kernel
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.batch import MultiScale
from detkernel_detection import Sample, Transform
from detkernel_detection.testing import TinyDataset, tiny_kernel
from detkernel_optim.ema import Ema
from detkernel_optim.phases import Change, Phases
from detkernel_optim.schedules import Cosine
from detkernel_optim.stepping import Sgd
from detkernel_runtime.device import Device

LENGTH = 4
"""Iterations of an epoch."""


@plugin
class Worse:
    """A metric that is best at its first validation but one."""

    values: list[float] = option(factory=lambda: [0.1, 0.9, 0.5, 0.4, 0.3], help="one for each validation")

    @hookimpl
    def after_val_set(self, run: Run) -> None:
        run.metrics.publish("mine/score", self.values[run.iter // LENGTH - 1], better="higher")


@plugin(resume_neutral=("*",))
class Look:
    """What there is before each iteration is trained, and an error behind one."""

    fail_at: int | None = option(default=None, help="the iteration behind which the run fails")
    rates: list[float] = state(factory=list)
    weights: list[Any] = state(factory=list)

    @hookimpl(trylast=True)
    def before_train_iter(self, run: Run) -> None:
        self.rates.append(run.optimizer.param_groups[0]["lr"])
        self.weights.append({name: value.clone() for name, value in run.bare_model.state_dict().items()})

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        if run.iter == self.fail_at:
            raise RuntimeError("killed")


@plugin
class Mark(Transform):
    """Makes images red, for a test to see in which epochs."""

    def __call__(self, sample: Sample) -> Sample:
        sample.image[0] = 255
        return sample


def kernel(folder: Path, *changes: Change, transforms: Any = (), until: str = "4 epochs", **plugins: Any) -> Kernel:
    standard = {
        "device": Device(device="cpu"),
        "data": Loader(
            train=TinyDataset(size=8), val=TinyDataset(size=2), train_transforms=list(transforms), workers=0
        ),
        "optimizer": Sgd(lr=0.05),
        "schedule": Cosine(),
        "ema": Ema(decay=0.5, ramp=0),
        "score": Worse(),
        "checkpoint": Checkpoint(best="mine/score"),
        "phases": Phases(changes=list(changes)) if changes else None,
    }
    active = {name: part for name, part in {**standard, **plugins}.items() if part is not None}
    return tiny_kernel(active, until=until, validate="1 epoch", work_dir=folder)


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def of_file(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "checkpoints" / name, weights_only=True)
    return found


LAST = Change(at=Span(3, "epochs"), load_best=True, restart_average=True, average_decay=0.9, lr_factor=0.5)


def test_the_best_is_loaded_the_average_begins_anew_and_rates_fall(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    look, ema = Look(), Ema(decay=0.5, ramp=0)
    with caplog.at_level(logging.INFO, "detkernel"):
        kernel(tmp_path / "phases", LAST, look=look, ema=ema).run()
    assert [text for text in caplog.messages if text.startswith("phase")] == [
        "phase 2 of 2, from iteration 12 on: on with the best weights, of iteration 8; the average begins anew with a "
        "decay of 0.9; learning rates times 0.5"
    ]
    best = of_file(tmp_path / "phases", "best_iter_8.pt")["model"]
    assert equal(look.weights[12], best)
    assert not equal(look.weights[11], best)
    plain = Look()
    kernel(tmp_path / "plain", look=plain).run()
    assert all(equal(*pair) for pair in zip(look.weights[:12], plain.weights[:12], strict=True))
    assert look.rates == [*plain.rates[:12], *(rate * 0.5 for rate in plain.rates[12:])]
    averages = {name: value.double() for name, value in best.items()}
    last = of_file(tmp_path / "phases", "iter_16.pt")
    for weights in [*look.weights[13:], last["training_model"]]:
        averages = {name: 0.9 * value + 0.1 * weights[name].double() for name, value in averages.items()}
    for name, value in last["model"].items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), averages[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("schedule", [Cosine(), None])
@pytest.mark.parametrize("fail_at", [8, 9, 12, 13])
def test_a_run_killed_in_each_phase_goes_on_bit_for_bit(tmp_path: Path, fail_at: int, schedule: Any):
    def made(folder: str, fail: int | None = None) -> Kernel:
        off = Change(at=Span(2, "epochs"), lr_factor=0.5, transforms_off=["Mark"])
        parts = {"look": Look(fail_at=fail), "checkpoint": Checkpoint(best="mine/score", every=Span(1, "iters"))}
        return kernel(tmp_path / folder, off, LAST, transforms=[Mark()], schedule=schedule, **parts)

    whole = made("whole").run()
    with pytest.raises(RuntimeError, match="killed"):
        made("parts", fail_at).run()
    resumed = made("parts").run()
    files = [of_file(tmp_path / folder, "iter_16.pt") for folder in ("whole", "parts")]
    for name in ("model", "training_model", "plugins", "position"):
        assert same(files[0][name], files[1][name])
    assert equal(whole.model.state_dict(), resumed.model.state_dict())


def test_transforms_are_used_in_the_epochs_that_phases_say(tmp_path: Path):
    @plugin
    class Red:
        """In which iterations images are red."""

        seen: list[bool] = state(factory=list)

        @hookimpl
        def before_train_iter(self, batch: Any) -> None:
            self.seen.append(bool((batch.images[:, 0] == 255).all()))

    for change, wanted in (
        (Change(at=Span(3, "epochs"), transforms_off=["Mark"]), [True] * 12 + [False] * 4),
        (Change(last=Span(1, "epochs"), transforms_on=["Mark"]), [False] * 12 + [True] * 4),
        (Change(share=0.5, transforms_off=["Mark"]), [True] * 8 + [False] * 8),
    ):
        red = Red()
        kernel(tmp_path, change, transforms=[Mark()], red=red, checkpoint=None).run()
        assert red.seen == wanted


def test_batch_transforms_are_used_in_the_epochs_that_phases_say(tmp_path: Path):
    @plugin
    class Sides:
        """How wide batches are."""

        seen: list[int] = state(factory=list)

        @hookimpl
        def before_train_iter(self, batch: Any) -> None:
            self.seen.append(batch.images.shape[-1])

    scale = MultiScale(sizes=[64])
    data = Loader(train=TinyDataset(size=8), val=TinyDataset(size=2), batch_transforms=[scale], workers=0)
    off = Change(at=Span(3, "epochs"), transforms_off=["multi_scale"])
    kernel(tmp_path, off, data=data, sides=(sides := Sides()), checkpoint=None).run()
    assert sides.seen == [64] * 12 + [32] * 4


@pytest.mark.parametrize(
    ("change", "begins"),
    [
        (Change(at=Span(5, "iters"), lr_factor=0.5), 5),
        (Change(at=Span(1, "epochs"), lr_factor=0.5), 4),
        (Change(share=0.3, lr_factor=0.5), 4),
        (Change(last=Span(3, "iters"), lr_factor=0.5), 13),
        (Change(last=Span(1, "epochs"), lr_factor=0.5), 12),
    ],
)
def test_where_a_phase_begins(tmp_path: Path, change: Change, begins: int):
    look = Look()
    kernel(tmp_path, change, look=look, checkpoint=None, schedule=None).run()
    assert look.rates == [0.05] * begins + [0.025] * (16 - begins)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected exactly one of at, share and last, got none of them"),
        ({"at": "1 epoch", "share": 0.5, "load_best": True}, "got at and share"),
        ({"at": "1 epoch"}, "at: nothing changes there; give load_best"),
        ({"at": "1 epoch", "load_best": True, "average_decay": 0.9}, "average_decay: it is that of an average begun"),
    ],
)
def test_a_change_says_where_and_what(options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Change(**options)


@pytest.mark.parametrize(
    ("changes", "plugins", "message"),
    [
        ([Change(at=Span(4, "epochs"), lr_factor=0.5)], {}, "at: it would begin at iteration 16, but the run has 16"),
        ([Change(last=Span(4, "epochs"), lr_factor=0.5)], {}, "last: it would begin at iteration 0, but the run has"),
        ([LAST, Change(share=0.5, lr_factor=2)], {}, "share: it begins where the one before it does, or sooner"),
        ([LAST], {"ema": None}, "restart_average: no active plugin keeps an average; add `ema: {}`"),
        ([LAST], {"checkpoint": None}, "load_best: no active plugin keeps the best weights; add `checkpoint: {best"),
        ([LAST], {"checkpoint": Checkpoint()}, "load_best: no active plugin keeps the best weights"),
        ([Change(at=Span(3, "iters"), load_best=True)], {}, "no validation ends before iteration 3, so none can be"),
        (
            [Change(at=Span(1, "epochs"), transforms_off=["Marc"])],
            {},
            "no transform is named 'Marc', did you mean 'Mark'",
        ),
        (
            [Change(at=Span(5, "iters"), transforms_off=["Mark"])],
            {},
            "since batches are loaded ahead: give whole epochs",
        ),
        ([Change(share=0.3, transforms_off=["Mark"])], {}, "give whole epochs here and in run.until"),
        (
            [
                Change(at=Span(2, "epochs"), transforms_off=["Mark"]),
                Change(at=Span(3, "epochs"), transforms_on=["Mark"]),
            ],
            {},
            r"transforms_on: 'Mark' cannot be used from then on (active: [0, 2])",
        ),
        (
            [
                Change(at=Span(1, "epochs"), transforms_on=["Mark"]),
                Change(at=Span(1, "epochs"), transforms_off=["Mark"]),
            ],
            {},
            "transforms_off: 'Mark' is not used before",
        ),
    ],
)
def test_mistakes_are_found_before_the_run(tmp_path: Path, changes: list[Change], plugins: Any, message: str):
    made = kernel(tmp_path, *changes, transforms=[Mark()], **plugins)
    with pytest.raises(UserError) as caught:
        made.run()
    assert message in str(caught.value)
    assert made.state.iter == 0


def test_no_best_to_load_is_a_clear_error(tmp_path: Path):
    with pytest.raises(
        CheckpointError, match="no best checkpoint to go on with: no validation has given a `mine/score`"
    ):
        kernel(tmp_path / "nan", LAST, score=Worse(values=[float("nan")] * 4)).run()

    @plugin
    class Remove:
        """Removes the best checkpoint."""

        @hookimpl
        def after_train_iter(self, run: Run) -> None:
            if run.iter == 11:
                (run.work_dir / "checkpoints" / "best_iter_8.pt").unlink()

    with pytest.raises(CheckpointError, match="has no best checkpoint to go on with: it is gone"):
        kernel(tmp_path / "gone", LAST, remove=Remove()).run()


def test_a_test_and_a_check_pass_with_it(tmp_path: Path):
    lines = kernel(tmp_path, LAST).check()
    assert lines["phases"] == "2, from iterations 0, 12 on"
    kernel(tmp_path, LAST).run()
    assert kernel(tmp_path, LAST).test().mode == "test"
