"""What a plugin sees of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from detkernel import Run, RunOptions, Span, UserError
from detkernel.bus import Bus


def run(until: str = "3 epochs", length: int = 4, **options: Any) -> Run:
    made = Run(options=RunOptions(until=Span.parse(until), **options), bus=Bus({}))
    made.loaders["train"] = [None] * length
    return made


class TestLength:
    @pytest.mark.parametrize(
        ("until", "iters", "epochs"),
        [("3 epochs", 12, 3), ("12 iters", 12, 3), ("13 iters", 13, 4), ("1 iter", 1, 1), ("4 iters", 4, 1)],
    )
    def test_in_iterations_and_epochs(self, until: str, iters: int, epochs: int):
        made = run(until)
        assert (made.max_iters, made.max_epochs, made.epoch_length) == (iters, epochs, 4)

    def test_it_is_done_when_all_iterations_are(self):
        made = run("2 iters")
        made.advance()
        assert not made.done
        made.advance()
        assert made.done

    def test_or_when_it_is_stopped(self):
        made = run()
        made.stop("enough")
        assert made.done


class TestPosition:
    def test_it_counts(self):
        made = run()
        for _ in range(4):
            made.advance()
        assert (made.iter, made.batch, made.epoch) == (4, 4, 0)
        made.end_epoch()
        made.advance()
        assert (made.iter, made.batch, made.epoch) == (5, 1, 1)

    def test_it_is_kept_as_plain_values_and_taken_up_again(self):
        made = run()
        for _ in range(5):
            made.advance()
        made.metrics["ap"] = 0.5
        kept = made.state_dict()
        assert kept == {
            "epoch": 0,
            "iter": 5,
            "batch": 5,
            "validated": 0,
            "metrics": {"ap": 0.5},
            "better": {},
            "history": {},
        }
        made.metrics["ap"] = 0.6
        again = run()
        again.load_state_dict(kept)
        assert again.state_dict() == kept
        again.metrics["ap"] = 0.7
        assert kept["metrics"] == {"ap": 0.5}


class TestValidation:
    def due(self, until: str, validate: str | None, at_end: bool = True) -> list[int]:
        made = run(until, validate=Span.parse(validate) if validate else None, validate_at_end=at_end)
        found = []
        for _ in range(made.max_iters):
            made.advance()
            if made.validation_due:
                found.append(made.iter)
                made.validated = made.iter
        return found

    @pytest.mark.parametrize(
        ("until", "validate", "at_end", "wanted"),
        [
            ("2 epochs", None, True, []),
            ("2 epochs", "1 epoch", True, [4, 8]),
            ("3 epochs", "2 epochs", True, [8, 12]),
            ("3 epochs", "2 epochs", False, [8]),
            ("10 iters", "3 iters", True, [3, 6, 9, 10]),
            ("10 iters", "3 iters", False, [3, 6, 9]),
            ("10 iters", "1 epoch", True, [4, 8, 10]),
            ("10 iters", "99 iters", True, [10]),
            ("10 iters", "99 iters", False, []),
        ],
    )
    def test_when_it_is_due(self, until: str, validate: str | None, at_end: bool, wanted: list[int]):
        assert self.due(until, validate, at_end) == wanted

    def test_never_before_the_first_iteration_and_never_twice(self):
        made = run(validate=Span(1, "iters"))
        assert not made.validation_due
        made.advance()
        assert made.validation_due
        made.validated = made.iter
        assert not made.validation_due


class TestModel:
    def test_what_wraps_it_is_taken_off_by_whoever_wrapped_it(self):
        made, model = run(), SimpleNamespace()
        made.model = model
        assert made.bare_model is model
        made.model = SimpleNamespace(inside=model)
        made.unwrap = lambda outer: getattr(outer, "inside", outer)
        assert made.bare_model is model
        made.model = model
        assert made.bare_model is model


def test_one_process_asks_nobody():
    made = run()
    assert made.processes.gathered(3) == [3]
    assert made.processes.from_main(lambda: 4) == 4
    assert (made.launch.restarts, made.launch.identity) == (0, "")


def test_classes_come_from_the_first_loader():
    made = run()
    made.loaders = {}
    with pytest.raises(UserError, match=r"^run\.classes is known once a loader is built; ask for it in build_model"):
        _ = made.classes
    made.loaders["val"] = SimpleNamespace(dataset=SimpleNamespace(classes=["cat", "dog"]))
    assert made.classes == ("cat", "dog")


def test_short_cuts():
    made = run(seed=7, work_dir=Path("runs/x"))
    assert (made.seed, made.work_dir, made.is_main) == (7, Path("runs/x"), True)
    made.rank = 1
    assert not made.is_main
    assert made.hook is made.bus.events


def test_one_iteration_at_least():
    with pytest.raises(ValueError, match=r"^until: expected at least 1 epoch or iteration, got '0 iters'$"):
        run("0 iters")
