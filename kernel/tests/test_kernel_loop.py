"""Which events fire in a run, in which order, with what: from a fresh start, from every position, and on a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from detkernel import CatalogError, Kernel, Run, RunOptions, Span, UserError, hookimpl, option, plugin, state
from detkernel.bus import Bus
from detkernel.loop import load
from detkernel.testing import PlainData, PlainDataset, PlainLoader, Recorder, plain_kernel, plain_run
from detkernel.testing.hook import HookContract


class Images:
    """A data set of a given length."""

    classes = ("cat", "dog")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


class Batches:
    """A loader whose batches say where they come from."""

    def __init__(self, mode: str, claimed: int, given: int | None = None) -> None:
        self.mode, self.claimed, self.given = mode, claimed, claimed if given is None else given
        self.dataset = Images(claimed)

    def __len__(self) -> int:
        return self.claimed

    def batches(self, epoch: int, start: int = 0) -> Iterator[str]:
        for number in range(start, self.given):
            yield f"{self.mode} {epoch}.{number}"


@plugin
class Fake:
    """Model, loaders and steps of plain Python."""

    train: int = option(default=3, help="batches in a training epoch")
    val: int = option(default=2, help="batches in a validation")
    given: int | None = option(default=None, help="batches that the train loader really gives")
    _run: Any = state()

    @hookimpl
    def build_loader(self, run: Run, mode: str) -> Batches | None:
        return Batches(mode, self.train, self.given) if mode == "train" else Batches(mode, self.val)

    @hookimpl
    def build_model(self, run: Run) -> str:
        return f"model of {len(run.classes)} classes"

    @hookimpl
    def train_step(self, batch: str) -> dict[str, float]:
        return {"loss": float(batch.rpartition(".")[2])}

    @hookimpl
    def val_step(self, batch: str) -> list[str]:
        return [batch.upper()]


@plugin
class Acts:
    """Does something at an event, when a condition holds."""

    at: str = option(default="", help="the event")
    when: Any = option(default=lambda run: True, help="the condition")
    do: Any = option(default=None, help="what is done")

    def _act(self, event: str, run: Run) -> None:
        if event == self.at and self.when(run):
            self.do(run)

    @hookimpl
    def setup(self, run: Run) -> None:
        self._act("setup", run)

    @hookimpl
    def before_run(self, run: Run) -> None:
        self._act("before_run", run)

    @hookimpl
    def before_train_epoch(self, run: Run) -> None:
        self._act("before_train_epoch", run)

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        self._act("after_train_iter", run)

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        self._act("after_val_epoch", run)

    @hookimpl
    def after_train_epoch(self, run: Run) -> None:
        self._act("after_train_epoch", run)

    @hookimpl
    def on_error(self, run: Run) -> None:
        self._act("on_error", run)

    @hookimpl
    def after_run(self, run: Run) -> None:
        self._act("after_run", run)


Made = tuple[Kernel, Recorder]
Make = Callable[..., Made]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("2 epochs", validate="1 epoch", mine=Mine())`: a kernel of fakes, and the recorder of its events."""

    def make(
        until: str, *, validate: str | None = None, at_end: bool = True, fake: Fake | None = None, **parts: object
    ):
        every = Span.parse(validate) if validate else None
        options = RunOptions(
            until=Span.parse(until), validate=every, validate_at_end=at_end, work_dir=tmp_path / "work"
        )
        kernel = Kernel({"fake": fake or Fake(), **parts}, options)
        recorder = Recorder()
        recorder.attach(kernel.state.bus)
        return kernel, recorder

    return make


SETUP = ["setup", "build_loader", "build_model", "prepare_model", "before_run"]
SETUP_VAL = ["setup", "build_loader", "build_loader", "build_model", "prepare_model", "before_run"]
CHECK = ["setup", *["build_loader"] * 3, "build_model", "prepare_model", "before_run"]
ITER = ["before_train_iter", "train_step", "after_train_iter"]
SET = ["before_val_set", *["before_val_iter", "val_step", "after_val_iter"] * 2, "after_val_set"]
VAL = ["before_val_epoch", *SET, "after_val_epoch"]
BEGIN, END = ["before_train_epoch"], ["after_train_epoch"]


class TestOrder:
    def test_epochs(self, make: Make):
        kernel, recorder = make("2 epochs")
        run = kernel.run()
        assert recorder.names() == SETUP + (BEGIN + ITER * 3 + END) * 2 + ["after_run"]
        assert (run.epoch, run.iter, run.batch, run.done) == (2, 6, 0, True)

    def test_iterations_that_end_inside_an_epoch(self, make: Make):
        kernel, recorder = make("4 iters")
        run = kernel.run()
        assert recorder.names() == SETUP + BEGIN + ITER * 3 + END + BEGIN + ITER + ["after_run"]
        assert (run.epoch, run.iter, run.batch) == (1, 4, 1)

    def test_iterations_that_end_with_an_epoch(self, make: Make):
        kernel, recorder = make("3 iters")
        kernel.run()
        assert recorder.names() == SETUP + BEGIN + ITER * 3 + END + ["after_run"]

    def test_a_validation_every_epoch(self, make: Make):
        kernel, recorder = make("2 epochs", validate="1 epoch")
        kernel.run()
        assert recorder.names() == SETUP_VAL + (BEGIN + ITER * 3 + VAL + END) * 2 + ["after_run"]

    def test_a_validation_every_few_iterations(self, make: Make):
        kernel, recorder = make("5 iters", validate="2 iters")
        kernel.run()
        first = BEGIN + ITER * 2 + VAL + ITER + END
        assert recorder.names() == SETUP_VAL + first + BEGIN + ITER + VAL + ITER + VAL + ["after_run"]

    def test_no_validation_at_the_end_unless_it_is_due(self, make: Make):
        kernel, recorder = make("5 iters", validate="2 iters", at_end=False)
        kernel.run()
        assert recorder.names()[-4:] == [*ITER, "after_run"]
        kernel, recorder = make("4 iters", validate="2 iters", at_end=False)
        kernel.run()
        assert recorder.names()[-11:] == [*VAL, "after_run"]

    def test_a_validation_at_the_end_is_not_done_twice(self, make: Make):
        kernel, recorder = make("4 iters", validate="2 iters")
        kernel.run()
        assert len(recorder.of("before_val_epoch")) == 2

    def test_a_workflow(self, tmp_path: Path):
        options = RunOptions(until=Span(4, "epochs"), workflow=[("train", 2), ("val", 1)], work_dir=tmp_path)
        kernel, recorder = Kernel({"fake": Fake()}, options), Recorder()
        recorder.attach(kernel.state.bus)
        kernel.run()
        train, val = ["before_train_epoch", "after_train_epoch"], ["before_val_epoch", "after_val_epoch"]
        assert recorder.names("epoch") == [*train, train[0], *val, train[1]] * 2

    def test_a_workflow_without_validation(self, tmp_path: Path):
        options = RunOptions(until=Span(1, "epochs"), workflow=[("train", 1)], work_dir=tmp_path)
        assert options.validate is None

    def test_what_the_events_are_given(self, make: Make):
        kernel, recorder = make("2 epochs", validate="1 epoch")
        kernel.run()
        assert [fired.arguments["mode"] for fired in recorder.of("build_loader")] == ["train", "val"]
        assert [fired.arguments["batch"] for fired in recorder.of("train_step")] == [
            *("train 0.0", "train 0.1", "train 0.2", "train 1.0", "train 1.1", "train 1.2")
        ]
        after = recorder.of("after_train_iter")[1].arguments
        assert (after["batch"], after["losses"]) == ("train 0.1", {"loss": 1.0})
        assert recorder.of("after_val_iter")[1].arguments["detections"] == ["VAL 0.1"]
        assert all(fired.arguments["run"] is kernel.state for fired in recorder.fired)

    def test_the_counts_and_modes_that_they_see(self, make: Make):
        seen: list[tuple[str, int, int, int, str]] = []

        def note(event: str) -> Acts:
            return Acts(at=event, do=lambda run: seen.append((event, run.epoch, run.iter, run.batch, run.mode)))

        events = ("before_train_epoch", "after_train_iter", "after_val_epoch", "after_train_epoch")
        kernel, _ = make("4 iters", validate="1 epoch", at_end=False, **{event: note(event) for event in events})
        run = kernel.run()
        assert seen == [
            ("before_train_epoch", 0, 0, 0, "train"),
            ("after_train_iter", 0, 1, 1, "train"),
            ("after_train_iter", 0, 2, 2, "train"),
            ("after_train_iter", 0, 3, 3, "train"),
            ("after_val_epoch", 0, 3, 3, "val"),
            ("after_train_epoch", 1, 3, 0, "train"),
            ("before_train_epoch", 1, 3, 0, "train"),
            ("after_train_iter", 1, 4, 1, "train"),
        ]
        assert (run.mode, run.model) == ("train", "model of 2 classes")


class TestStop:
    def test_the_run_ends_behind_the_iteration(self, make: Make):
        stops = Acts(at="after_train_iter", when=lambda run: run.iter == 2, do=lambda run: run.stop("enough", 7))
        kernel, recorder = make("9 epochs", mine=stops)
        run = kernel.run()
        assert recorder.names() == SETUP + BEGIN + ITER * 2 + ["after_run"]
        assert (run.stop_reason, run.exit_status, run.iter, run.batch, run.error) == ("enough", 7, 2, 2, None)

    def test_at_the_end_of_an_epoch_that_epoch_is_complete(self, make: Make):
        stops = Acts(at="after_train_iter", when=lambda run: run.iter == 3, do=lambda run: run.stop("enough"))
        kernel, recorder = make("9 epochs", mine=stops)
        assert kernel.run().epoch == 1
        assert recorder.names()[-2:] == ["after_train_epoch", "after_run"]

    def test_a_validation_that_is_due_is_still_done(self, make: Make):
        stops = Acts(at="after_train_iter", when=lambda run: run.iter == 2, do=lambda run: run.stop("enough"))
        kernel, recorder = make("9 epochs", validate="2 iters", mine=stops)
        kernel.run()
        assert recorder.names() == SETUP_VAL + BEGIN + ITER * 2 + VAL + ["after_run"]

    def test_in_a_validation(self, make: Make):
        stops = Acts(at="after_val_epoch", do=lambda run: run.stop("good enough"))
        kernel, recorder = make("9 epochs", validate="1 epoch", mine=stops)
        kernel.run()
        assert recorder.names() == SETUP_VAL + BEGIN + ITER * 3 + VAL + END + ["after_run"]

    @pytest.mark.parametrize("event", ["setup", "before_run"])
    def test_before_the_first_iteration(self, make: Make, event: str):
        kernel, recorder = make("9 epochs", mine=Acts(at=event, do=lambda run: run.stop("no need")))
        kernel.run()
        assert recorder.names() == [*SETUP, "after_run"]

    def test_the_first_reason_counts(self, make: Make):
        kernel, _ = make("1 epoch")
        kernel.state.stop("first", 3)
        kernel.state.stop("second", 4)
        assert (kernel.state.stop_reason, kernel.state.exit_status) == ("first", 3)


class TestResume:
    """Wherever a run is taken up, it fires exactly the events that remain."""

    @pytest.mark.parametrize("validate", [None, "1 epoch", "2 iters"])
    @pytest.mark.parametrize("event", ["after_train_iter", "after_val_epoch", "after_train_epoch"])
    @pytest.mark.parametrize("iteration", range(1, 8))
    def test_from_every_position(self, make: Make, validate: str | None, event: str, iteration: int):
        saved: list[tuple[dict[str, Any], int]] = []

        def save(run: Run) -> None:
            saved.append((run.state_dict(), len(recorder.fired)))

        saves = Acts(at=event, when=lambda run: run.iter == iteration, do=save)
        kernel, recorder = make("7 iters", validate=validate, mine=saves)
        kernel.run()
        if not saved:
            return  # nothing of the kind fires at this iteration
        position, fired = saved[0]
        resumes = Acts(at="before_run", do=lambda run: run.load_state_dict(position))
        again, heard = make("7 iters", validate=validate, mine=resumes)
        run = again.run()
        assert heard.names()[len(SETUP if validate is None else SETUP_VAL) :] == recorder.names()[fired:]
        batches = [fired.arguments["batch"] for fired in recorder.of("train_step")]
        assert [fired.arguments["batch"] for fired in heard.of("train_step")] == batches[position["iter"] :]
        assert run.state_dict() == kernel.state.state_dict()

    def test_a_position_saved_before_a_validation_owes_it(self, make: Make):
        position = {"epoch": 0, "iter": 2, "batch": 2, "validated": 0, "metrics": {}}
        resumes = Acts(at="before_run", do=lambda run: run.load_state_dict(position))
        kernel, recorder = make("3 iters", validate="2 iters", mine=resumes)
        kernel.run()
        assert recorder.names() == SETUP_VAL + VAL + ITER + VAL + END + ["after_run"]

    def test_a_position_at_the_end_of_an_epoch_owes_its_end(self, make: Make):
        position = {"epoch": 0, "iter": 3, "batch": 3, "validated": 3, "metrics": {}}
        resumes = Acts(at="before_run", do=lambda run: run.load_state_dict(position))
        kernel, recorder = make("3 iters", validate="1 epoch", mine=resumes)
        run = kernel.run()
        assert recorder.names() == [*SETUP_VAL, *END, "after_run"]
        assert (run.epoch, run.batch) == (1, 0)

    def test_a_complete_run_does_nothing(self, make: Make):
        position = {"epoch": 2, "iter": 6, "batch": 0, "validated": 6, "metrics": {"ap": 0.5}}
        resumes = Acts(at="before_run", do=lambda run: run.load_state_dict(position))
        kernel, recorder = make("2 epochs", validate="1 epoch", mine=resumes)
        run = kernel.run()
        assert recorder.names() == [*SETUP_VAL, "after_run"]
        assert run.metrics == {"ap": 0.5}

    def test_a_longer_run_goes_on(self, make: Make):
        position = {"epoch": 1, "iter": 3, "batch": 0, "validated": 3, "metrics": {}}
        resumes = Acts(at="before_run", do=lambda run: run.load_state_dict(position))
        kernel, recorder = make("2 epochs", mine=resumes)
        kernel.run()
        assert recorder.names() == SETUP + BEGIN + ITER * 3 + END + ["after_run"]
        assert recorder.of("train_step")[0].arguments["batch"] == "train 1.0"


def fail(message: str) -> Callable[[Run], None]:
    def do(run: Run) -> None:
        raise ArithmeticError(message)

    return do


class TestFailure:
    @pytest.mark.parametrize("event", ["setup", "before_run", "after_train_iter", "after_val_epoch"])
    def test_on_error_then_after_run_and_the_error_is_raised(self, make: Make, event: str):
        kernel, recorder = make("9 epochs", validate="1 epoch", mine=Acts(at=event, do=fail("broken")))
        with pytest.raises(ArithmeticError, match="broken") as caught:
            kernel.run()
        assert recorder.names()[-3:] == [event, "on_error", "after_run"]
        assert kernel.state.error is recorder.of("on_error")[0].arguments["error"] is caught.value
        iteration = {"after_train_iter": 1, "after_val_epoch": 3}.get(event, 0)
        assert caught.value.__notes__ == [
            f"raised in plugin 'mine' ({Acts.__module__}:Acts), event {event}, iteration {iteration}"
        ]

    def test_a_failure_of_the_loader_names_the_iteration(self, make: Make):
        @plugin
        class Breaks:
            """Its loader breaks."""

            @hookimpl(wrapper=True)
            def build_loader(self) -> Any:
                loader = yield
                loader.batches = self.broken
                return loader

            def broken(self, epoch: int, start: int = 0) -> Iterator[str]:
                yield "train 0.0"
                raise ArithmeticError("torn file")

        kernel, _ = make("1 epoch", mine=Breaks())
        with pytest.raises(ArithmeticError) as caught:
            kernel.run()
        assert caught.value.__notes__ == ["raised outside of any plugin's event, iteration 1"]

    def test_a_users_mistake_has_no_notes(self, make: Make):
        def do(run: Run) -> None:
            raise UserError("no such folder")

        kernel, recorder = make("1 epoch", mine=Acts(at="before_run", do=do))
        with pytest.raises(UserError) as caught:
            kernel.run()
        assert not hasattr(caught.value, "__notes__")
        assert recorder.names()[-2:] == ["on_error", "after_run"]

    def test_an_interrupt_ends_the_run_in_order(self, make: Make):
        def do(run: Run) -> None:
            raise KeyboardInterrupt

        kernel, recorder = make("1 epoch", mine=Acts(at="after_train_iter", do=do))
        with pytest.raises(KeyboardInterrupt):
            kernel.run()
        assert recorder.names()[-2:] == ["on_error", "after_run"]

    @pytest.mark.parametrize("event", ["on_error", "after_run"])
    def test_one_that_fails_on_the_way_out_stops_no_other_and_is_told(self, make: Make, event: str):
        reached: list[str] = []
        kernel, _ = make(
            "1 epoch",
            breaks=Acts(at="after_train_iter", do=fail("first")),
            mine=Acts(at=event, do=fail("second")),
            other=Acts(at=event, do=lambda run: reached.append("other")),
        )
        with pytest.raises(ArithmeticError, match="first") as caught:
            kernel.run()
        assert reached == ["other"]
        attributed, also = caught.value.__notes__
        assert attributed.startswith("raised in plugin 'breaks'")
        assert also.startswith(f"and then, in {event}: Traceback (most recent call last)")
        assert "ArithmeticError: second" in also
        assert "raised in plugin 'mine'" in also

    def test_a_failure_in_after_run_alone_is_raised(self, make: Make):
        reached: list[str] = []
        kernel, _ = make(
            "1 epoch",
            mine=Acts(at="after_run", do=fail("first")),
            too=Acts(at="after_run", do=fail("second")),
            other=Acts(at="after_run", do=lambda run: reached.append("other")),
        )
        with pytest.raises(ArithmeticError, match="first") as caught:
            kernel.run()
        assert reached == ["other"]
        assert caught.value.__notes__[0].startswith("raised in plugin 'mine'")
        assert "ArithmeticError: second" in caught.value.__notes__[1]
        assert kernel.state.iter == 3


class TestSetup:
    def test_the_composed_config_is_written(self, tmp_path: Path):
        options = RunOptions(until=Span(1, "epochs"), work_dir=tmp_path / "new" / "work")
        config: Mapping[str, Any] = {"run": {"until": "1 epoch"}, "fake": {"use": "fake"}}
        Kernel({"fake": Fake()}, options, config=config, versions={"detkernel-kernel": "0.1.0"}).run()
        assert (tmp_path / "new" / "work" / "config.yaml").read_text() == (
            "# detkernel-kernel 0.1.0\nrun:\n  until: 1 epoch\nfake:\n  use: fake\n"
        )

    def test_what_a_killed_run_left_there_is_removed(self, tmp_path: Path):
        (tmp_path / "predictions").mkdir()
        left = [
            tmp_path / ".config.yaml.999999999.abcdefgh.tmp",
            tmp_path / "predictions" / ".x.999999999.a1_defgh.tmp",
        ]
        for path in left:
            path.touch()
        Kernel({"fake": Fake()}, RunOptions(until=Span(1, "iters"), work_dir=tmp_path)).check()
        assert all(path.exists() for path in left)
        Kernel({"fake": Fake()}, RunOptions(until=Span(1, "iters"), work_dir=tmp_path)).run()
        assert not any(path.exists() for path in left)

    def test_only_by_the_main_process(self, make: Make, tmp_path: Path):
        def second(run: Run) -> None:
            run.rank = 1

        make("1 epoch", mine=Acts(at="setup", do=second))[0].run()
        assert not (tmp_path / "work").exists()

    def test_a_work_dir_that_cannot_be_written(self, make: Make, tmp_path: Path):
        (tmp_path / "work").write_text("a file")
        with pytest.raises(
            UserError, match=r"^run\.work_dir: .*work cannot be written: (File exists|Not a directory)$"
        ):
            make("1 epoch")[0].run()

    @pytest.mark.parametrize(("mode", "fake"), [("train", Fake(train=0)), ("val", Fake(val=0))])
    @pytest.mark.parametrize("until", ["1 epoch", "3 iters"])
    def test_a_loader_without_batches(self, make: Make, mode: str, fake: Fake, until: str):
        with pytest.raises(UserError, match=rf"^the loader for '{mode}' has no batches: its data set is empty, or"):
            make(until, validate="1 epoch", fake=fake)[0].run()

    def test_no_loader(self, make: Make):
        @plugin
        class TrainOnly(Fake):
            """It loads what is trained on only."""

            @hookimpl
            def build_loader(self, mode: str) -> Batches | None:
                return Batches(mode, 3) if mode == "train" else None

        with pytest.raises(UserError, match=r"^no plugin made a loader for 'val': give the loader a `val` data set$"):
            make("1 epoch", validate="1 epoch", fake=TrainOnly())[0].run()

    def test_one_that_detects_is_needed_for_a_validation_only(self, make: Make):
        @plugin
        class NoDetections:
            """It trains, and does not detect."""

            build_loader = Fake.build_loader
            build_model = Fake.build_model
            train_step = Fake.train_step
            train, val, given = 3, 2, None

        assert make("1 epoch", fake=NoDetections())[0].run().iter == 3
        with pytest.raises(UserError, match=r"^no active plugin provides val_step; active are fake\. Add one"):
            make("1 epoch", validate="1 epoch", fake=NoDetections())
        with pytest.raises(UserError, match=r"^no active plugin provides val_step"):
            make("1 epoch", fake=NoDetections())[0].test()

    @pytest.mark.parametrize("given", [0, 2, 4])
    @pytest.mark.parametrize("until", ["2 epochs", "9 iters"])
    def test_a_loader_that_gives_more_or_fewer_batches_than_it_says(self, make: Make, given: int, until: str):
        with pytest.raises(RuntimeError, match=rf"^the train loader says it has 3 batches, but gave {given}\b"):
            make(until, fake=Fake(given=given))[0].run()


class TestOther:
    def test_a_test_fires_the_events_of_a_validation(self, make: Make, tmp_path: Path):
        modes: list[str] = []
        notes = Acts(at="after_val_epoch", do=lambda run: modes.append(run.mode))
        kernel, recorder = make("9 epochs", validate="1 epoch", mine=notes)
        run = kernel.test()
        assert recorder.names() == [*SETUP, *VAL, "after_run"]
        assert recorder.of("build_loader")[0].arguments["mode"] == "test"
        assert (modes, run.iter) == (["test"], 0)
        assert recorder.of("val_step")[0].arguments["batch"] == "test 0.0"
        assert not (tmp_path / "work").exists()

    def test_a_check_takes_two_steps_of_each_and_leaves_no_work_dir(self, make: Make, tmp_path: Path):
        @plugin
        class Sums:
            """It sums up."""

            name: str = option(default="", help="of its line")

            @hookimpl
            def summary(self, run: Run) -> dict[str, str]:
                return {self.name: f"iteration {run.iter}, checking {run.checking}, in {run.work_dir.name}"}

        kernel, recorder = make("9 epochs", validate="1 epoch", a=Sums(name="a"), b=Sums(name="b"))
        lines = kernel.check()
        assert recorder.names() == CHECK + BEGIN + ITER * 2 + VAL * 2 + ["summary", "after_run"]
        assert [event.arguments["mode"] for event in recorder.of("build_loader")] == ["train", "val", "test"]
        assert lines == dict.fromkeys("ab", "iteration 2, checking True, in work")
        assert {event.arguments["run"].work_dir for event in recorder.of("summary")} == {tmp_path / "work"}
        assert not (tmp_path / "work").exists()

    def test_a_check_without_validation(self, make: Make):
        kernel, recorder = make("9 epochs")
        assert kernel.check() == {}
        assert recorder.names() == CHECK + BEGIN + ITER * 2 + VAL * 2 + ["summary", "after_run"], "what is there"
        assert not kernel.state.options.validate
        assert kernel.state.check_data
        fast, _ = make("9 epochs")
        fast.check(fast=True)
        assert not fast.state.check_data

    def test_a_process_without_a_batch_to_validate_goes_on(self, make: Make):
        kernel, recorder = make("1 epoch", validate="1 epoch", fake=Fake(val=0))
        kernel.state.world_size = 8
        kernel.run()
        assert recorder.names().count("after_val_epoch") == 1


class TestLoaders:
    @plugin
    class Second:
        """Makes the loaders of some modes."""

        modes: list[str] = option(factory=lambda: ["val"], help="which")
        made: list[Any] = state(factory=list)
        closed: list[str] = state(factory=list)

        @hookimpl
        def build_loader(self, run: Run, mode: str) -> Any:
            if mode not in self.modes:
                return None
            made, closed = Batches(mode, 2), self.closed
            made.close = lambda: closed.append(mode)  # type: ignore[attr-defined]
            return made

    @plugin
    class Model:
        """A model without data."""

        fails: str = option(default="", help="at which event")

        @hookimpl
        def build_model(self, run: Run) -> str:
            return "model"

        @hookimpl
        def train_step(self, run: Run, batch: str) -> dict[str, float]:
            if self.fails == "train_step":
                raise RuntimeError("in the step")
            return {"loss": 0.0}

        @hookimpl
        def val_step(self, batch: str) -> list[str]:
            return [batch]

    def kernel(self, folder: Path, **plugins: object) -> Kernel:
        return Kernel(plugins, RunOptions(until=Span(1, "epochs"), validate=Span(1, "epochs"), work_dir=folder))

    def test_two_for_one_mode_are_an_error_that_names_both(self, tmp_path: Path):
        first, second = self.Second(modes=["train", "val"]), self.Second(modes=["val"])
        made = self.kernel(tmp_path, model=self.Model(), data=first, more=second)
        with pytest.raises(
            CatalogError, match=r"plugin 'data' .* and plugin 'more' .* both make a loader for 'val'; keep"
        ):
            made.run()
        assert (first.closed, second.closed) == (["val", "train"], ["val"])

    def test_each_may_make_those_of_other_modes(self, tmp_path: Path):
        first, second = self.Second(modes=["train"]), self.Second(modes=["val"])
        run = self.kernel(tmp_path, model=self.Model(), data=first, more=second).run()
        assert (run.iter, run.validated) == (2, 2)
        assert (first.closed, second.closed) == (["train"], ["val"])

    @pytest.mark.parametrize("command", ["run", "test", "check"])
    @pytest.mark.parametrize("fails", ["", "train_step"])
    def test_they_are_closed_at_the_end_however_it_comes(self, tmp_path: Path, command: str, fails: str):
        loaders = self.Second(modes=["train", "val", "test"])
        made = self.kernel(tmp_path, model=self.Model(fails=fails), data=loaders)
        if fails and command != "test":
            with pytest.raises(RuntimeError, match="in the step"):
                getattr(made, command)()
        else:
            getattr(made, command)()
        expected = {"run": ["train", "val"], "test": ["test"], "check": ["train", "val", "test"]}
        assert loaders.closed == expected[command]

    def test_one_that_cannot_be_closed_is_told(self, tmp_path: Path):
        @plugin
        class Stuck:
            """A loader that fails to close."""

            @hookimpl
            def build_loader(self, run: Run, mode: str) -> Any:
                made = Batches(mode, 1)

                def close() -> None:
                    raise OSError(f"{mode} does not close")

                made.close = close  # type: ignore[attr-defined]
                return made

        with pytest.raises(OSError, match="train does not close") as caught:
            self.kernel(tmp_path, model=self.Model(), data=Stuck()).run()
        assert "val does not close" in caught.value.__notes__[0]


@plugin
class Sets:
    """Two validation sets beside `val`, and a metric."""

    @hookimpl
    def setup(self, run: Run) -> None:
        run.val_sets = ("night", "rain")

    @hookimpl
    def after_val_set(self, run: Run) -> None:
        run.metrics.publish("mine/count", len(run.loader) + len(run.val_set), better="higher")


class TestValidationSets:
    def test_each_is_validated_at_every_validation_with_metrics_of_its_own(self):
        recorder, batches = Recorder(), ["before_val_iter", "val_step", "after_val_iter"] * 4
        run = plain_run({"sets": Sets()}, until="8 iters", validate="4 iters", recorder=recorder)
        one = ["before_val_set", *batches, "after_val_set"]
        assert recorder.names("val") == ["before_val_epoch", *one * 3, "after_val_epoch"] * 2
        assert run.metrics == {"mine/count": 4, "night/mine/count": 9, "rain/mine/count": 8}
        assert run.metrics.better("night/mine/count") == "higher"
        assert run.metrics.history("rain/mine/count") == [(4, 8.0), (8, 8.0)]
        assert (run.mode, run.val_set) == ("train", "")

    def test_each_is_tested(self):
        recorder = Recorder()
        run = plain_kernel({"sets": Sets()}, recorder=recorder).test()
        assert list(run.loaders) == ["test", "night", "rain"]
        assert list(run.metrics) == ["mine/count", "night/mine/count", "rain/mine/count"]

    def test_none_is_loaded_where_nothing_is_validated(self):
        assert list(plain_run({"sets": Sets()}).loaders) == ["train"]

    def test_a_check_looks_at_each_once(self):
        recorder = Recorder()
        kernel = plain_kernel({"sets": Sets()}, recorder=recorder)
        kernel.check()
        assert list(kernel.state.loaders) == ["train", "val", "test", "night", "rain"]
        assert len(recorder.of("before_val_set")) == 4
        assert len(recorder.of("before_val_iter")) == 8


class TestValidationAtTheStart:
    def test_it_is_done_once(self, tmp_path: Path):
        recorder = Recorder()
        options = RunOptions(
            until=Span(1, "epochs"), validate=Span(1, "epochs"), validate_at_start=True, work_dir=tmp_path
        )
        made = Kernel({"fake": Fake()}, options)
        recorder.attach(made.state.bus)
        made.run()
        names = recorder.names()
        assert names.count("before_val_epoch") == 2
        assert names.index("before_val_epoch") < names.index("before_train_epoch")

    def test_not_again_where_a_checkpoint_of_then_has_its_metrics(self):
        options = RunOptions(until=Span(1, "epochs"), validate=Span(1, "epochs"), validate_at_start=True)
        run = Run(options=options, bus=Bus({}))
        assert run.validation_due
        run.metrics.publish("ap", 0.0, better="higher")
        assert not run.validation_due

    def test_it_needs_validations(self):
        with pytest.raises(ValueError, match="validate_at_start: needs `validate`, such as 'every 1 epoch'"):
            RunOptions(until=Span(1, "epochs"), validate_at_start=True)


def test_a_validation_every_nothing_is_refused():
    with pytest.raises(ValueError, match="validate: expected at least 1 epoch or iteration, or null, got '0 epochs'"):
        RunOptions(until=Span(1, "epochs"), validate=Span(0, "epochs"))


class Closing(PlainLoader):
    """One that can be closed."""


@plugin(loaders=("second",))
class Second:
    """Trains with numbers of a second loader."""

    drawn: list = state(factory=list)

    @hookimpl(wrapper=True)
    def train_step(self, run):
        self.drawn.append(run.next_batch("second"))
        return (yield)


class TestFurtherLoaders:
    def data(self):
        @plugin
        class Loaders:
            """Loaders of two modes."""

            closed: list = state(factory=list)

            @hookimpl
            def build_loader(self, run, mode):
                size = {"train": 8, "second": 6}[mode]
                loader = Closing(PlainDataset([float(number) for number in range(size)]), 2, run.seed)
                loader.close = lambda: self.closed.append(mode)
                return loader

        return Loaders()

    def test_it_goes_round_beside_the_training_data_and_is_closed(self, tmp_path: Path):
        second, data = Second(), self.data()
        run = plain_run({"data": data, "second": second}, until="7 iters", work_dir=tmp_path)
        assert list(run.loaders) == ["train", "second"]
        loader = run.loaders["second"]
        assert second.drawn == [batch for epoch in range(3) for batch in loader.batches(epoch)][:7]
        assert sorted(data.closed) == ["second", "train"]

    def test_one_that_nobody_makes_is_an_error(self, tmp_path: Path):
        @plugin
        class Train:
            """Only for training."""

            @hookimpl
            def build_loader(self, run, mode):
                return PlainData().build_loader(run, mode) if mode == "train" else None

        with pytest.raises(UserError, match="no plugin made a loader for 'second'"):
            plain_run({"data": Train(), "second": Second()}, work_dir=tmp_path)

    def test_two_that_make_it_are_an_error(self, tmp_path: Path):
        @plugin
        class More:
            """Makes the second loader, too."""

            @hookimpl
            def build_loader(self, run, mode):
                return PlainData().build_loader(run, mode) if mode == "second" else None

        plugins = {"data": self.data(), "more": More(), "second": Second()}
        with pytest.raises(CatalogError, match="both make a loader for 'second'"):
            plain_run(plugins, work_dir=tmp_path)


class TestAFurtherLoaderResumes(HookContract):
    name = "second"

    def plugin(self):
        @plugin
        class Learns(Second):
            """Lets the second numbers change what is learned."""

            @hookimpl(wrapper=True, specname="train_step")
            def _more(self, run):
                losses = yield
                return {"loss": type(losses["loss"])(losses["loss"] + sum(self.drawn[-1]))}

        return Learns()


def test_loaders_are_made_without_a_model_and_closed_and_nothing_is_left(tmp_path):
    closed = []

    class Closing(PlainLoader):
        def close(self):
            closed.append(len(self))

    @plugin
    class Data(PlainData):
        """Loaders that tell when they are closed."""

        @hookimpl
        def build_loader(self, run, mode):
            return None if mode == "test" else Closing(PlainDataset([1.0, 2.0]), 1, 0)

    kernel = plain_kernel({"data": Data()}, work_dir=tmp_path / "work")
    with kernel.loading() as run:
        assert load(run, "train") is run.loaders["train"]
        assert load(run, "test") is None
        (run.work_dir / "written").touch()
        assert run.work_dir != tmp_path / "work"
    assert closed == [2]
    assert run.model is None
    assert run.work_dir == tmp_path / "work"
    assert not (tmp_path / "work").exists()
