import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from detkernel import ConfigError, UserError, hookimpl, option, plugin, state
from detkernel.metrics import Better
from detkernel_detection.testing import tiny_kernel, tiny_run
from detkernel_guards.check_classes import CheckClasses
from detkernel_guards.check_invalid_loss import CheckInvalidLoss
from detkernel_guards.early_stopping import EarlyStopping
from detkernel_guards.max_time import MaxTime, seconds
from detkernel_guards.signals import Signals


def breaking(at, value):
    @plugin
    class Breaking:
        """Makes the loss invalid from an iteration on."""

        @hookimpl(wrapper=True)
        def train_step(self, run):
            losses = yield
            return {**losses, "loss_bbox": losses["loss_bbox"] * value} if run.iter + 1 >= at else losses

    return Breaking()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_invalid_loss_stops_the_run_before_the_weights_are_stepped(value, tmp_path):
    kept = {}

    @plugin
    class Keep:
        """Keeps the weights at the end."""

        @hookimpl
        def after_run(self, run):
            kept["finite"] = all(bool(p.isfinite().all()) for p in run.model.parameters())

    plugins = {"break": breaking(4, value), "check": CheckInvalidLoss(interval=2), "keep": Keep()}
    with pytest.raises(UserError, match=r"iteration 4: loss_bbox is -?(nan|inf) \(images \d, \d\)"):
        tiny_run(plugins, work_dir=tmp_path, until="8 iters")
    assert kept["finite"]


def test_the_first_iteration_is_always_checked(tmp_path):
    with pytest.raises(UserError, match="iteration 1"):
        tiny_run({"break": breaking(1, float("nan")), "check": CheckInvalidLoss()}, work_dir=tmp_path)


def broken_once(at, value=float("nan")):
    @plugin
    class BrokenOnce:
        """Makes the loss of one iteration invalid."""

        @hookimpl(wrapper=True)
        def train_step(self, run):
            losses = yield
            return {**losses, "loss_bbox": losses["loss_bbox"] * value} if run.iter + 1 == at else losses

    return BrokenOnce()


@plugin
class NoStep:
    """Takes the place of the optimizer, so that an invalid loss breaks nothing that could be seen later."""


@pytest.mark.parametrize(
    ("at", "more", "options", "since"),
    [
        (3, {}, {"until": "4 iters"}, "1 iteration went on with it"),  # the end
        (4, {}, {"until": "4 iters"}, "The weights were not stepped with it"),
        (3, {}, {"until": "40 iters", "validate": "4 iters"}, "2 iterations went on with it"),
        (3, {"limit": MaxTime(limit="0.001 s")}, {"until": "40 iters"}, None),
    ],
)
def test_no_loss_is_passed_over_however_long_the_interval(at, more, options, since, tmp_path):
    plugins = {"break": broken_once(at), "check": CheckInvalidLoss(interval=1000), "optimizer": NoStep(), **more}
    if since is None:  # it ends in iteration 1
        assert tiny_run(plugins, work_dir=tmp_path, **options).iter == 1
        return
    with pytest.raises(UserError, match=rf"iteration {at}: loss_bbox is nan \(images \d, \d\)\. {since}"):
        tiny_run(plugins, work_dir=tmp_path, **options)


def test_an_early_stop_is_no_way_round_the_check(tmp_path):
    @plugin
    class Stop:
        """Stops the run in the iteration with the invalid loss."""

        @hookimpl
        def after_train_iter(self, run):
            if run.iter == 3:
                run.stop("enough")

    plugins = {"break": broken_once(3), "check": CheckInvalidLoss(), "optimizer": NoStep(), "stop": Stop()}
    with pytest.raises(UserError, match="iteration 3: loss_bbox is nan"):
        tiny_run(plugins, work_dir=tmp_path, until="40 iters")


def test_the_interval_looks_before_the_weights_are_stepped(tmp_path):
    for interval, since in ((5, "2 iterations went on with it"), (3, "The weights were not stepped with it")):
        plugins = {"break": broken_once(3), "check": CheckInvalidLoss(interval=interval), "optimizer": NoStep()}
        with pytest.raises(UserError, match=since):
            tiny_run(plugins, work_dir=tmp_path, until="40 iters")


@pytest.mark.parametrize("value", [1.0, 0.0])
@pytest.mark.parametrize(
    ("constant", "moves_at", "told"), [(6, 99, True), (6, 6, False), (None, 99, False), (9, 99, False)]
)
def test_a_loss_that_never_moves_is_told_once(value, constant, moves_at, told, tmp_path, caplog):
    @plugin
    class Stuck:
        """Gives a loss that says the same until some iteration."""

        @hookimpl(wrapper=True)
        def train_step(self, run):
            losses = yield
            return {**losses, "loss_stuck": torch.tensor(value + (run.iter + 1 >= moves_at))}

    check = CheckInvalidLoss(interval=4, constant=constant)
    tiny_run({"stuck": Stuck(), "check": check}, work_dir=tmp_path, until="8 iters")
    expected = f"loss_stuck has been exactly {value:.6g} in each of the first 6 iterations"
    assert caplog.text.count(expected) == told
    assert caplog.text.count("has been exactly") == told


def test_an_accuracy_may_be_nan(tmp_path):
    @plugin
    class Accuracy:
        """Adds an accuracy of nothing."""

        @hookimpl(wrapper=True)
        def train_step(self):
            losses = yield
            return {**losses, "acc": torch.tensor(float("nan"))}

    assert tiny_run({"a": Accuracy(), "check": CheckInvalidLoss(interval=1)}, work_dir=tmp_path).iter == 4


def test_a_model_of_another_class_count(tmp_path):
    @plugin
    class Wrong:
        """Says that its head has 7 classes."""

        @hookimpl
        def prepare_model(self, run):
            run.model[3].num_classes = 7

    with pytest.raises(UserError, match=r"the model's 3 has 7 classes, but the data has 3 \(red, green, blue\)"):
        tiny_run({"wrong": Wrong(), "check": CheckClasses()}, work_dir=tmp_path)


def test_labels_beyond_the_classes_name_the_image(tmp_path):
    @plugin(priority="high")
    class Shift:
        """Counts labels from 1."""

        @hookimpl
        def before_train_iter(self, batch):
            batch.targets.labels[batch.targets.valid] += 1

    with pytest.raises(UserError, match=r"image \d: labels \[3\], but the data has 3 classes, counted from 0"):
        tiny_run({"shift": Shift(), "check": CheckClasses(interval=1)}, work_dir=tmp_path)


def test_early_stopping_waits_and_stops(tmp_path):
    metrics = iter([0.1, 0.3, 0.2, 0.3, float("nan"), 0.9])

    @plugin
    class Score:
        """Publishes a metric."""

        @hookimpl
        def after_val_epoch(self, run):
            run.metrics.publish("mAP", next(metrics), better="higher")

    run = tiny_run(
        {"score": Score(), "stop": EarlyStopping(metric="mAP", patience=3)},
        work_dir=tmp_path, until="20 iters", validate="every 1 iters",
    )  # fmt: skip
    assert run.iter == 5
    assert run.stop_reason == "mAP has not improved for 3 validations (best: 0.3000)"
    assert run.exit_status == 0


@pytest.mark.parametrize(
    ("better", "rule", "metrics", "delta", "ends"),
    [
        ("higher", None, [0.1, 0.2, 0.2, 0.1], 0, 4),
        ("lower", None, [0.5, 0.4, 0.4, 0.6], 0, 4),
        ("lower", "higher", [0.5, 0.4, 0.4, 0.6], 0, 3),
        (None, "lower", [0.5, 0.4, 0.4, 0.6], 0, 4),
        ("higher", None, [0.1, 0.15, 0.25, 0.3, 0.31], 0.1, 5),
        ("lower", None, [0.5, 0.45, 0.41, 0.3], 0.1, 3),
    ],
)
def test_early_stopping_goes_by_the_direction_of_the_metric(better, rule, metrics, delta, ends, tmp_path):
    left = iter(metrics)

    @plugin
    class Score:
        """Publishes a metric."""

        @hookimpl
        def after_val_epoch(self, run):
            run.metrics.publish("loss", next(left), better=better)

    stop = EarlyStopping(metric="loss", patience=2, rule=rule, min_delta=delta)
    run = tiny_run({"score": Score(), "stop": stop}, work_dir=tmp_path, until="20 iters", validate="every 1 iters")
    assert run.iter == ends


def test_early_stopping_needs_a_direction_and_says_what_nan_means(tmp_path, caplog):
    @plugin
    class Score:
        """Publishes a metric."""

        better: Better | None = option(default="higher", help="which")

        @hookimpl
        def after_val_epoch(self, run):
            run.metrics.publish("mAP", float("nan"), better=self.better)

    with pytest.raises(ConfigError, match="'mAP' does not say whether higher or lower is better"):
        tiny_run(
            {"score": Score(better=None), "stop": EarlyStopping(metric="mAP")}, work_dir=tmp_path, validate="1 iter"
        )
    plugins = {"score": Score(), "stop": EarlyStopping(metric="mAP", patience=3)}
    run = tiny_run(plugins, work_dir=tmp_path, until="9 iters", validate="1 iter")
    assert (run.iter, run.stop_reason) == (3, "mAP has not improved for 3 validations (best: none yet)")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 1
    assert "it is nan, as a metric is where the validation data has nothing that it measures" in told[0]


def test_early_stopping_by_a_metric_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no metric is named 'mAP'"):
        tiny_run({"stop": EarlyStopping(metric="mAP")}, work_dir=tmp_path, validate="every 1 iters")


def test_max_time_stops_with_the_status_to_come_back(tmp_path):
    run = tiny_run({"time": MaxTime(limit="0.01 seconds")}, work_dir=tmp_path, until="100000 iters")
    assert 0 < run.iter < 100000
    assert (run.exit_status, run.stop_reason) == (75, "the time limit of 0.01 seconds is reached")


@pytest.mark.parametrize(("text", "expected"), [("8 hours", 28800), ("1d 2h", 93600), ("90min", 5400), ("1.5 h", 5400)])
def test_times(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["8", "hours", "8 parsecs", "", "1h!"])
def test_no_times(text):
    with pytest.raises(ValueError, match="expected a time such as '8 hours'"):
        MaxTime(limit=text)


def test_an_unknown_signal(tmp_path):
    with pytest.raises(ConfigError, match="no signal is called 'SIGTRM', did you mean 'SIGTERM'"):
        tiny_run({"signals": Signals(names=["SIGTRM"])}, work_dir=tmp_path)


SCRIPT = """
import sys
from detkernel import hookimpl, plugin, state
from detkernel.metrics import Better
from detkernel_detection.testing import tiny_kernel, tiny_run
from detkernel_guards.signals import Signals

@plugin
class Say:
    '''Says what happens.'''

    @hookimpl
    def after_train_iter(self, run):
        print("iteration", run.iter, flush=True)

    @hookimpl
    def after_run(self, run):
        print("after_run", run.iter, run.stop_reason, flush=True)

    @hookimpl
    def after_val_iter(self, run):
        print("slow", flush=True)
        import time
        if len(sys.argv) > 2:
            time.sleep(30)

run = tiny_run({"signals": Signals(), "say": Say()}, until="1000000 iters", work_dir=sys.argv[1],
               validate="every 3 iters" if len(sys.argv) > 2 else None)
raise SystemExit(run.exit_status)
"""


def start(folder, *more):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("slow" if more else "iteration 2"):
            return process
    raise AssertionError(process.stderr.read())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_well(name, tmp_path):
    process = start(tmp_path)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75
    assert out.splitlines()[-1].endswith(f"{name} was received")
    assert "Traceback" not in err


def test_a_second_interrupt_leaves_at_once(tmp_path):
    process = start(tmp_path, "slow")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # it would finish the validation
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    assert "after_run" in out
    assert "KeyboardInterrupt" in err


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    tiny_run({"signals": Signals()}, work_dir=tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("told", [True, False])
def test_a_process_that_ends_with_the_run_hears_no_signal_on_its_way_out(told, tmp_path):
    before = signal.getsignal(signal.SIGUSR2)
    kernel = tiny_kernel({"signals": Signals(names=["SIGUSR2"]), "raise": Raise(name="SIGUSR2" if told else "SIGCONT")},
                         work_dir=tmp_path)  # fmt: skip
    kernel.state.ends_process = True
    try:
        kernel.run()
        assert signal.getsignal(signal.SIGUSR2) == (signal.SIG_IGN if told else before)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_signal_while_the_end_is_saved_ends_nothing(tmp_path):
    @plugin(priority="lowest")
    class SaveSlowly:
        """Is told to stop in the midst of its save, as a launcher does when another process has left."""

        saved: bool = state(default=False)

        @hookimpl
        def after_run(self):
            signal.raise_signal(signal.SIGTERM)
            self.saved = True

    slow = SaveSlowly()
    tiny_run({"signals": Signals(), "slow": slow}, work_dir=tmp_path)
    assert slow.saved


def test_a_test_is_ended_by_a_signal_as_any_program_is(tmp_path):
    @plugin
    class Look:
        """Reads the handler."""

        handler: object = state(default=None)

        @hookimpl
        def before_run(self):
            self.handler = signal.getsignal(signal.SIGINT)

    look, before = Look(), signal.getsignal(signal.SIGINT)
    tiny_kernel({"signals": Signals(), "look": look}, work_dir=tmp_path).test()
    assert look.handler is before


def test_early_stopping_remembers_in_a_resume():
    first = EarlyStopping(metric="mAP", patience=2)
    first._best, first._waited = 0.5, 1
    second = EarlyStopping(metric="mAP", patience=2)
    second.load_state_dict(first.state_dict())
    assert (second._best, second._waited) == (0.5, 1)


@plugin
class Score:
    """Publishes a metric that gets no better."""

    @hookimpl
    def after_val_epoch(self, run):
        run.metrics.publish("mAP", 0.5, better="higher")


def test_a_run_that_stopped_early_is_finished_for_good(tmp_path):
    first = EarlyStopping(metric="mAP", patience=2)
    first._best, first._waited = 0.5, 2

    @plugin
    class Resume:
        """What the checkpoint plugin does."""

        @hookimpl(trylast=True)
        def before_run(self, run):
            run.bus["stop"].load_state_dict(first.state_dict())

    for patience, ends in ((2, 0), (3, 1)):
        run = tiny_run(
            {"stop": EarlyStopping(metric="mAP", patience=patience), "resume": Resume(), "score": Score()},
            work_dir=tmp_path, until="9 iters", validate="every 1 iters",
        )  # fmt: skip
        assert run.iter == ends
        assert run.stop_reason == f"mAP has not improved for {patience} validations (best: 0.5000)"


def test_what_looks_at_validations_needs_some(tmp_path):
    with pytest.raises(ConfigError, match=r"there are no validations to look at; set run.validate"):
        tiny_run({"stop": EarlyStopping(metric="mAP")}, work_dir=tmp_path)


def test_a_check_finds_a_metric_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no metric is named 'mAP'"):
        tiny_kernel({"stop": EarlyStopping(metric="mAP")}, work_dir=tmp_path, validate="every 1 iters").check()


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_signal_that_no_program_is_told_of(name, tmp_path):
    with pytest.raises(ConfigError, match=f"names: no program is told of {name}"):
        tiny_run({"signals": Signals(names=[name])}, work_dir=tmp_path)


def test_what_is_told_to_stop_when_all_is_done_has_not_been_stopped(tmp_path):
    @plugin
    class Late:
        """A signal in the last validation."""

        @hookimpl
        def before_val_epoch(self, run):
            run.stop("SIGTERM was received", 75)

    run = tiny_run({"late": Late()}, work_dir=tmp_path, until="3 iters", validate="every 3 iters")
    assert (run.iter, run.stop_reason, run.exit_status) == (3, None, 0)


@plugin
class Raise:
    """Sends this process a signal in an iteration."""

    name: str = option(help="of the signal")

    @hookimpl
    def after_train_iter(self, run):
        if run.iter == 2:
            signal.raise_signal(getattr(signal, self.name))


@pytest.mark.parametrize(("name", "ends"), [("SIGUSR2", 2), ("SIGCONT", 4)])
def test_the_signals_that_are_named_end_the_run_with_the_status_that_is_given(name, ends, tmp_path):
    plugins = {"signals": Signals(names=["SIGUSR2"], exit_status=7), "raise": Raise(name=name)}
    run = tiny_run(plugins, work_dir=tmp_path, until="4 iters")
    assert (run.iter, run.exit_status) == (ends, 7 if ends == 2 else 0)
    assert run.stop_reason == ("SIGUSR2 was received" if ends == 2 else None)


def test_max_time_ends_with_the_status_that_is_given(tmp_path):
    run = tiny_run({"time": MaxTime(limit="0.001 s", exit_status=9)}, work_dir=tmp_path, until="100 iters")
    assert (run.iter, run.exit_status) == (1, 9)


@pytest.mark.parametrize(("interval", "seen"), [(1, True), (3, True), (4, False)])
def test_labels_are_checked_every_so_many_iterations(interval, seen, tmp_path):
    @plugin(priority="high")
    class Shift:
        """Counts labels from 10 in the fourth iteration."""

        @hookimpl
        def before_train_iter(self, run, batch):
            batch.targets.labels[batch.targets.valid] += 10 * (run.iter == 3)

        @hookimpl(wrapper=True)
        def train_step(self, batch):
            batch.targets.labels.remainder_(3)
            return (yield)

    plugins = {"shift": Shift(), "check": CheckClasses(interval=interval)}
    if not seen:
        assert tiny_run(plugins, work_dir=tmp_path, until="4 iters").iter == 4
        return
    with pytest.raises(UserError, match="but the data has 3 classes, counted from 0"):
        tiny_run(plugins, work_dir=tmp_path, until="4 iters")
