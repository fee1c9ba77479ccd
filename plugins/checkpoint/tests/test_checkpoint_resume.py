"""A run that is stopped and resumed equals one that never was, bit for bit, wherever it was stopped."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import CheckpointError, Run, Span, UserError, hookimpl, option, plugin, state
from detkernel.processes import Launch
from detkernel.testing import Recorder
from detkernel_checkpoint import checkpoint_file
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_checkpoint.folder import Folder
from detkernel_detection.testing import TinyDetector, TinySgd, tiny_kernel, tiny_run
from torch import Tensor


@plugin(state_per_rank=True, priority="highest")
class Generators:
    """What the `device` plugin does for random numbers."""

    @hookimpl
    def setup(self, run: Run) -> None:
        torch.manual_seed(run.seed)
        random.seed(run.seed)

    def state_dict(self) -> dict[str, Any]:
        version, words, gauss = random.getstate()
        return {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        torch.set_rng_state(state["torch"])


@plugin
class Noise:
    """Disturbs the weights with numbers of both generators, and publishes a metric."""

    _total: float = state(default=0.0)

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        self._total += random.random()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3 * random.random())

    @hookimpl(tryfirst=True)
    def after_val_epoch(self, run: Run) -> None:
        run.metrics["tiny/mAP"] = run.iter % 7 / 7

    def state_dict(self) -> dict[str, Any]:
        return {"total": self._total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._total = state["total"]


@plugin(resume_neutral=("*",))
class Leave:
    """Leaves a run as a power cut would: nothing is saved on the way out."""

    at: int = option(help="iteration")
    event: str = option(default="before_train_iter", help="where")

    @hookimpl(trylast=True)
    def before_train_iter(self, run: Run) -> None:
        self._go(run, "before_train_iter")

    @hookimpl(trylast=True)
    def after_train_iter(self, run: Run) -> None:
        self._go(run, "after_train_iter")

    @hookimpl(trylast=True)
    def after_val_epoch(self, run: Run) -> None:
        self._go(run, "after_val_epoch")

    def _go(self, run: Run, event: str) -> None:
        if (run.iter, event) == (self.at, self.event):
            raise KeyboardInterrupt


@plugin(priority="highest", resume_neutral=("*",))
class Started:
    """Says how the process was started, as the plugin does that makes several."""

    launch: Any = option(help="how")

    @hookimpl
    def setup(self, run: Run) -> None:
        run.launch = self.launch


def parts(**more: Any) -> dict[str, Any]:
    return {"generators": Generators(), "noise": Noise(), "checkpoint": Checkpoint(), **more}


def everything(run: Run) -> dict[str, Any]:
    """The whole state of a run that is at its end."""
    states = {name: part.state_dict() for name, part in run.bus.stateful()}
    return {"model": run.bare_model.state_dict(), "position": run.state_dict(), **states}


def assert_same(one: Any, other: Any, path: str = "") -> None:
    assert type(one) is type(other), path
    if isinstance(one, Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}.{number}")
    else:
        assert one == other, path


LENGTH: dict[str, Any] = {"until": "3 epochs", "validate": "3 iters"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """The state at the end of a run that nothing disturbed (12 iterations in 3 epochs), and its events."""
    recorder = Recorder()
    run = tiny_run(parts(), **LENGTH, work_dir=tmp_path_factory.mktemp("whole"), recorder=recorder)
    return everything(run), recorder.names()


@pytest.mark.parametrize("every", ["1 iter", "2 iters", "5 iters", "1 epoch"])
@pytest.mark.parametrize(
    "stop", [(2, "before_train_iter"), (3, "after_train_iter"), (6, "after_val_epoch"), (12, "after_train_iter")]
)
def test_a_resumed_run_equals_the_undisturbed_one(tmp_path: Path, undisturbed: Any, every: str, stop: tuple[int, str]):
    checkpoint = Checkpoint(every=Span.parse(every))
    with pytest.raises(KeyboardInterrupt):
        tiny_run(parts(checkpoint=checkpoint, leave=Leave(at=stop[0], event=stop[1])), **LENGTH, work_dir=tmp_path)
    torch.rand(17), random.random()
    run = tiny_run(parts(checkpoint=Checkpoint()), **LENGTH, work_dir=tmp_path)
    assert_same(everything(run), undisturbed[0])


def test_a_resumed_run_fires_exactly_what_remains(tmp_path: Path, undisturbed: Any):
    every = Checkpoint(every=Span(1, "iters"))
    for at, event in ((4, "after_train_iter"), (6, "after_train_iter"), (12, "after_train_iter")):
        with pytest.raises(KeyboardInterrupt):
            tiny_run(parts(checkpoint=every, leave=Leave(at=at, event=event)), **LENGTH, work_dir=tmp_path / str(at))
        recorder = Recorder()
        tiny_run(parts(), **LENGTH, work_dir=tmp_path / str(at), recorder=recorder)
        loop = [name for name in recorder.names()[recorder.names().index("before_run") + 1 :] if name != "before_save"]
        assert loop == [name for name in undisturbed[1] if name != "before_save"][-len(loop) :]
        assert loop[0] == {4: "after_train_epoch", 6: "before_val_epoch", 12: "before_val_epoch"}[at]


def test_asynchronous_saving_writes_what_synchronous_saving_writes(tmp_path: Path):
    contents = []
    for asynchronous in (True, False):
        checkpoint = Checkpoint(every=Span(1, "iters"), asynchronous=asynchronous)
        tiny_run(parts(checkpoint=checkpoint), **LENGTH, work_dir=tmp_path / str(asynchronous))
        files = sorted((tmp_path / str(asynchronous) / "checkpoints").glob("iter_*.pt"))
        assert len(files) == 12
        contents.append({file.name: torch.load(file, weights_only=True) for file in files})
    for one in contents:
        for content in one.values():
            content["provenance"] = None
    assert_same(contents[0], contents[1])


def test_a_finished_run_is_finished(tmp_path: Path):
    tiny_run(parts(), **LENGTH, work_dir=tmp_path)
    before = (tmp_path / "checkpoints" / "iter_12.pt").stat().st_mtime_ns
    recorder = Recorder()
    run = tiny_run(parts(), **LENGTH, work_dir=tmp_path, recorder=recorder)
    assert run.iter == 12
    assert "before_train_iter" not in recorder.names()
    assert (tmp_path / "checkpoints" / "iter_12.pt").stat().st_mtime_ns == before


def test_a_stopped_run_is_saved_where_it_stopped_and_goes_on(tmp_path: Path, undisturbed: Any):
    @plugin(resume_neutral=("*",))
    class Stop:
        """A batch system's signal."""

        @hookimpl
        def after_train_iter(self, run: Run) -> None:
            if run.iter == 5:
                run.stop("out of time", exit_status=3)

    stopped = tiny_run(parts(stop=Stop()), **LENGTH, work_dir=tmp_path)
    assert stopped.iter == 5
    assert (tmp_path / "checkpoints" / "iter_5.pt").exists()
    assert_same(everything(tiny_run(parts(), **LENGTH, work_dir=tmp_path)), undisturbed[0])


def test_the_newest_valid_one_is_found_when_the_last_is_torn(
    tmp_path: Path, undisturbed: Any, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(KeyboardInterrupt):
        tiny_run(parts(checkpoint=Checkpoint(every=Span(2, "iters")), leave=Leave(at=9)), **LENGTH, work_dir=tmp_path)
    newest = tmp_path / "checkpoints" / "iter_8.pt"
    newest.write_bytes(newest.read_bytes()[:-400])
    (newest.parent / "iter_6.pt").write_text("")
    with caplog.at_level("INFO", "detkernel"):
        run = tiny_run(parts(), **LENGTH, work_dir=tmp_path)
    assert_same(everything(run), undisturbed[0])
    text = caplog.text
    assert "iter_8.pt: torn, or no checkpoint of a run: it does not end with a checksum; an older one is taken" in text
    assert "iter_6.pt: torn, or no checkpoint: it has only 0 bytes" in text
    assert "going on from" in text
    assert "iter_4.pt: epoch 1, iteration 4" in text


def test_an_earlier_checkpoint_can_be_named_and_the_later_ones_are_set_aside(tmp_path: Path, undisturbed: Any):
    every = Checkpoint(every=Span(4, "iters"))
    tiny_run(parts(checkpoint=every), **LENGTH, work_dir=tmp_path)
    path = tmp_path / "checkpoints" / "iter_4.pt"
    with pytest.raises(KeyboardInterrupt):
        tiny_run(parts(checkpoint=Checkpoint(resume=str(path)), leave=Leave(at=6)), **LENGTH, work_dir=tmp_path)
    assert sorted(p.name for p in (path.parent / "aside_1").iterdir()) == ["iter_12.pt", "iter_8.pt"]
    assert_same(everything(tiny_run(parts(), **LENGTH, work_dir=tmp_path)), undisturbed[0])


def test_never_starts_afresh_and_keeps_the_old_ones(tmp_path: Path, undisturbed: Any):
    tiny_run(parts(), until="2 epochs", validate="3 iters", work_dir=tmp_path)
    recorder = Recorder()
    run = tiny_run(parts(checkpoint=Checkpoint(resume="never")), **LENGTH, work_dir=tmp_path, recorder=recorder)
    assert recorder.names().count("after_train_iter") == 12
    assert_same(everything(run), undisturbed[0])
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "aside_1").iterdir()) == ["iter_4.pt", "iter_8.pt"]


def test_a_restart_goes_on_even_with_never(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        tiny_run(parts(leave=Leave(at=5)), **LENGTH, work_dir=tmp_path)
    recorder = Recorder()
    again = parts(checkpoint=Checkpoint(resume="never"), started=Started(launch=Launch(restarts=1)))
    tiny_run(again, **LENGTH, work_dir=tmp_path, recorder=recorder)
    assert recorder.names().count("after_train_iter") == 8


def test_where_none_is_valid_nothing_starts_afresh_unasked(tmp_path: Path):
    tiny_run(parts(checkpoint=Checkpoint(every=Span(2, "iters"))), until="4 iters", work_dir=tmp_path)
    for path in (tmp_path / "checkpoints").glob("*iter_*.pt"):
        path.write_bytes(path.read_bytes()[:-100])
    message = r"checkpoints: none of its 2 checkpoints can be used; the newest: .*iter_4.pt: torn, .* give resume=never"
    for kernel in tiny_kernel(parts(), until="4 iters", work_dir=tmp_path), tiny_kernel(parts(), work_dir=tmp_path):
        with pytest.raises(CheckpointError, match=message):
            kernel.run()
    run = tiny_run(parts(checkpoint=Checkpoint(resume="never")), until="4 iters", work_dir=tmp_path)
    assert run.iter == 4


def test_a_format_to_come_is_an_error_even_where_there_are_older_ones(tmp_path: Path):
    tiny_run(parts(checkpoint=Checkpoint(every=Span(2, "iters"))), until="4 iters", work_dir=tmp_path)
    path = tmp_path / "checkpoints" / "iter_4.pt"
    checkpoint_file.write(path, {**checkpoint_file.read(path), "format": 2})
    with pytest.raises(CheckpointError, match=r"iter_4.pt: has format 2, this detkernel reads 1"):
        tiny_run(parts(), until="4 iters", work_dir=tmp_path)


def test_a_path_that_is_not_there_says_what_was_expected(tmp_path: Path):
    tiny_run(parts(), until="4 iters", work_dir=tmp_path)
    for given, hint in (("no", "and no such file"), ("iter_4.pt", "did you mean '.*checkpoints/iter_4.pt'?")):
        with pytest.raises(UserError, match=rf"resume: expected 'auto', 'never' or .* path, got '{given}', {hint}"):
            tiny_run(parts(checkpoint=Checkpoint(resume=given)), until="4 iters", work_dir=tmp_path)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path):
    held = Folder(tmp_path / "checkpoints").hold()
    assert held is not None
    held.write("mine")
    script = f"""
from detkernel_detection.testing import tiny_run
from detkernel_checkpoint.checkpoint import Checkpoint
tiny_run({{"checkpoint": Checkpoint()}}, until="2 iters", work_dir={str(tmp_path)!r})
"""
    refused = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"checkpoints: another run is at work there (process {os.getpid()} on " in refused.stderr
    assert not list((tmp_path / "checkpoints").glob("*.pt"))
    held.release()
    tiny_run(parts(), until="2 iters", work_dir=tmp_path)
    assert list((tmp_path / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("own", [True, False])
def test_a_restart_takes_only_what_this_run_has_saved(tmp_path: Path, own: bool):
    """An attempt may die before it has made the folder its own."""
    first = parts(leave=Leave(at=5), started=Started(launch=Launch(0, "first")))
    with pytest.raises(KeyboardInterrupt):
        tiny_run(first, **LENGTH, work_dir=tmp_path)
    recorder = Recorder()
    started = Started(launch=Launch(1, "first" if own else "second"))
    again = parts(checkpoint=Checkpoint(resume="never"), started=started)
    tiny_run(again, **LENGTH, work_dir=tmp_path, recorder=recorder)
    assert recorder.names().count("after_train_iter") == (8 if own else 12)


def test_what_differs_is_listed_and_can_be_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tiny_run(parts(optimizer=TinySgd(lr=0.01)), until="4 iters", work_dir=tmp_path)
    changed = {"optimizer": TinySgd(lr=0.02), "model": TinyDetector(dropout=0.2), "leave": Leave(at=99)}
    with pytest.raises(CheckpointError) as caught:
        tiny_run(parts(**changed), until="6 iters", work_dir=tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("iter_4.pt is of another run than this one:")
    assert lines[1:3] == [
        "  optimizer.lr: 0.01 -> 0.02",
        "  model.dropout: 0.1 -> 0.2",
    ]
    assert "  checkpoint.accept_changes=true   go on from it nevertheless" in lines
    accepted = parts(**changed, checkpoint=Checkpoint(accept_changes=True))
    run = tiny_run(accepted, until="6 iters", work_dir=tmp_path)
    assert run.iter == 6
    assert "optimizer.lr: 0.01 -> 0.02" in caplog.text


@pytest.mark.parametrize(
    ("first", "then"), [("2 epochs", "3 epochs"), ("5 iters", "3 epochs"), ("1 epoch", "12 iters")]
)
def test_training_on_for_longer_is_no_other_run(
    tmp_path: Path, undisturbed: Any, first: str, then: str, caplog: pytest.LogCaptureFixture
):
    tiny_run(parts(), until=first, validate="3 iters", work_dir=tmp_path)
    with caplog.at_level("INFO", "detkernel"):
        run = tiny_run(parts(), until=then, validate="3 iters", work_dir=tmp_path)
    assert run.iter == 12
    whole, expected = everything(run), dict(undisturbed[0])
    expected["position"] = {**expected["position"], "history": whole["position"]["history"]}  # of an end in between too
    assert_same(whole, expected)
    assert f"run.until: {first} -> {then}: training goes on to the new end" in caplog.text


def test_a_shorter_run_is_another_run(tmp_path: Path):
    tiny_run(parts(), until="2 epochs", work_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"run.until: 2 epochs -> 5 iters"):
        tiny_run(parts(), until="5 iters", work_dir=tmp_path)


def test_a_plugin_added_or_removed_is_a_difference_unless_it_is_neutral(tmp_path: Path):
    tiny_run(parts(), until="4 iters", work_dir=tmp_path)
    without = parts(leave=Leave(at=99))
    del without["noise"]
    with pytest.raises(CheckpointError, match=r"noise.use: Noise -> \(absent\)\n") as caught:
        tiny_run(without, until="4 iters", work_dir=tmp_path)
    assert "leave" not in str(caught.value)


def test_other_data_is_a_difference(tmp_path: Path):
    from detkernel_detection.testing import TinyData, TinyDataset

    def data(seed: int) -> Any:
        dataset = TinyDataset(size=8)
        dataset.load()
        dataset._boxes[3] = (1, 2, 3, 4 + seed)
        return TinyData(dataset=dataset)

    tiny_run(parts(data=data(0)), until="4 iters", work_dir=tmp_path)
    tiny_run(parts(data=data(0)), until="4 iters", work_dir=tmp_path)
    with pytest.raises(CheckpointError, match="the train data: other images, order or annotations"):
        tiny_run(parts(data=data(1)), until="4 iters", work_dir=tmp_path)


def test_other_versions_are_told_and_do_not_stop_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for version in ("1.0", "2.0"):
        kernel = tiny_kernel(parts(), until="4 iters", work_dir=tmp_path)
        kernel.state.versions = {"detkernel-mine": version}
        kernel.run()
    assert (
        "the last bits may differ from those of a run that went on undisturbed: detkernel-mine: 1.0 -> 2.0"
        in caplog.text
    )


@pytest.mark.parametrize(("until", "begun", "end"), [("3 epochs", 1, (6, 3)), ("6 iters", 3, (6, 3))])
def test_a_shorter_epoch_that_was_accepted_keeps_what_the_run_is_measured_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, until: str, begun: int, end: tuple[int, int]
):
    from detkernel_detection.testing import TinyData

    with pytest.raises(KeyboardInterrupt):
        tiny_run(
            parts(checkpoint=Checkpoint(every=Span(1, "iters")), leave=Leave(at=3)), until="2 epochs", work_dir=tmp_path
        )
    more = parts(data=TinyData(batch_size=4), checkpoint=Checkpoint(accept_changes=True))
    run = tiny_run(more, until=until, work_dir=tmp_path)
    assert (run.iter, run.epoch) == end
    assert f"an epoch has 2 iterations, and had 4: iteration 3 is now iteration {begun}, in epoch" in caplog.text


def test_a_state_that_does_not_fit_names_the_plugin(tmp_path: Path):
    class Changed(Noise):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("average")

    Changed.__qualname__ = "Noise"
    tiny_run(parts(), until="4 iters", work_dir=tmp_path)
    accepted = parts(noise=Changed(), checkpoint=Checkpoint(accept_changes=True))
    tiny_run(accepted, until="4 iters", work_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"iter_4.pt: the state of plugin 'noise' does not fit: KeyError"):
        tiny_run(parts(noise=Changed()), until="4 iters", work_dir=tmp_path)


@plugin
class Older:
    """`Noise` in a version that kept nothing."""

    @hookimpl(tryfirst=True)
    def after_val_epoch(self, run: Run) -> None:
        run.metrics["tiny/mAP"] = run.iter % 7 / 7


Older.__qualname__ = "Noise"


@pytest.mark.parametrize(
    ("first", "then", "what"),
    [
        (Older, Noise, "has no state of plugin 'noise'"),
        (Noise, Older, "has states that no active plugin takes: noise"),
    ],
)
def test_a_state_that_is_missing_or_not_taken_is_a_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: Any, then: Any, what: str
):
    tiny_run(parts(noise=first()), until="4 iters", work_dir=tmp_path)
    with pytest.raises(CheckpointError, match=rf"iter_4.pt {what}: it was written by another version"):
        tiny_run(parts(noise=then()), until="4 iters", work_dir=tmp_path)
    tiny_run(parts(noise=then(), checkpoint=Checkpoint(accept_changes=True)), until="4 iters", work_dir=tmp_path)
    assert what in caplog.text


def test_epochs_of_another_length_leave_no_newer_checkpoint_and_owe_validations(tmp_path: Path):
    from detkernel_detection.testing import TinyData

    parted = {"data": TinyData(batch_size=1), "checkpoint": Checkpoint(every=Span(1, "iters"))}
    with pytest.raises(KeyboardInterrupt):
        tiny_run(
            parts(**parted, leave=Leave(at=13)), until="2 epochs", validate="1 epoch", work_dir=tmp_path
        )  # 8 iterations an epoch
    shorter = {"data": TinyData(batch_size=2), "checkpoint": Checkpoint(accept_changes=True, keep=2)}
    with pytest.raises(KeyboardInterrupt):
        tiny_run(parts(**shorter, leave=Leave(at=7)), until="2 epochs", validate="1 epoch", work_dir=tmp_path)
    folder = Folder(tmp_path / "checkpoints")
    assert folder.entries()[0].iteration == 6, "13 of 16 are 6 of 8, saved at once"
    run = tiny_run(parts(data=TinyData(batch_size=2)), until="2 epochs", validate="1 epoch", work_dir=tmp_path)
    assert (run.iter, run.epoch, run.validated) == (8, 2, 8)
    assert folder.entries()[0].iteration == 8


def test_a_refused_run_leaves_the_folder_as_it_was(tmp_path: Path):
    tiny_run(parts(noise=Older()), until="4 iters", work_dir=tmp_path / "other")
    tiny_run(parts(), until="4 iters", work_dir=tmp_path)
    given = Checkpoint(resume=str(tmp_path / "other/checkpoints/iter_4.pt"))
    with pytest.raises(CheckpointError, match="has no state of plugin 'noise'"):
        tiny_run(parts(checkpoint=given), until="4 iters", work_dir=tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*iter_*")) == ["iter_4.pt"]


def test_what_replaces_a_harmless_plugin_is_a_difference(tmp_path: Path):
    tiny_run(parts(extra=Leave(at=99)), until="4 iters", work_dir=tmp_path)
    with pytest.raises(CheckpointError, match=r"extra.use: Leave -> Noise"):
        tiny_run(parts(extra=Noise()), until="4 iters", work_dir=tmp_path)


@pytest.mark.parametrize("neutral", [False, True])
def test_the_code_of_a_local_plugin_counts_unless_no_result_follows_from_it(tmp_path: Path, neutral: bool):
    import importlib

    from detkernel import local

    file = tmp_path / f"mine_{neutral}.py"
    source = f"""
from detkernel import hookimpl, plugin

@plugin(resume_neutral={("*",) if neutral else ()})
class Mine:
    "Does nothing."
"""
    file.write_text(source)
    tiny_run(parts(mine=local.load(file).Mine()), until="4 iters", work_dir=tmp_path)
    file.write_text(source + "# changed")
    again = parts(mine=importlib.reload(local.load(file)).Mine())
    if neutral:
        tiny_run(again, until="4 iters", work_dir=tmp_path)
    else:
        with pytest.raises(CheckpointError, match=rf"mine_{neutral}.py: its code has changed"):
            tiny_run(again, until="4 iters", work_dir=tmp_path)


@pytest.mark.parametrize("accept", [True, False])
@pytest.mark.parametrize("wrong", [{"batch": 100}, {"epoch": 50}])
def test_a_position_that_is_none_is_refused(tmp_path: Path, wrong: dict[str, int], accept: bool):
    tiny_run(parts(), until="4 iters", work_dir=tmp_path)
    path = tmp_path / "checkpoints" / "iter_4.pt"
    content = checkpoint_file.read(path)
    checkpoint_file.write(path, {**content, "position": {**content["position"], **wrong}})
    with pytest.raises(CheckpointError, match="its position is none with 4 iterations an epoch"):
        tiny_run(parts(checkpoint=Checkpoint(accept_changes=accept)), until="4 iters", work_dir=tmp_path)


@pytest.mark.parametrize("config", [[], {"run": []}, {"run": {"until": 3}}, {"run": {"until": [1]}}, "text"])
def test_a_config_in_a_checkpoint_that_is_none_is_another_one(tmp_path: Path, config: Any):
    tiny_run(parts(), until="2 iters", work_dir=tmp_path)
    path = tmp_path / "checkpoints" / "iter_2.pt"
    content = checkpoint_file.read(path)
    checkpoint_file.write(path, {**content, "provenance": {**content["provenance"], "config": config}})
    with pytest.raises(CheckpointError, match="iter_2"):
        tiny_run(parts(), until="3 iters", work_dir=tmp_path)
    if not isinstance(config, str):
        accepted = parts(checkpoint=Checkpoint(accept_changes=True))
        assert tiny_run(accepted, until="3 iters", work_dir=tmp_path).iter == 3
