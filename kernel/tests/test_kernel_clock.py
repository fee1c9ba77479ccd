import io
import time

import pytest
from detkernel import hookimpl, plugin
from detkernel.clock import Clock
from detkernel.testing.plain import PlainModel, plain_kernel, plain_run
from detkernel.trace import Tracer


@plugin
class Slow:
    """Sleeps."""

    @hookimpl
    def before_optimizer_step(self):
        time.sleep(0.01)


@plugin
class Around:
    """Sleeps before and after the forward pass."""

    @hookimpl(wrapper=True)
    def train_step(self):
        time.sleep(0.005)
        losses = yield
        time.sleep(0.005)
        return losses


def test_the_time_of_an_event_is_not_that_of_the_plugin_which_fires_it():
    kernel = plain_kernel({"slow": Slow()})
    clock = Clock(kernel.state.bus)
    kernel.run()
    assert clock.calls["slow", "before_optimizer_step"] == 4
    assert clock.seconds["slow", "before_optimizer_step"] >= 0.04
    assert clock.calls["optimizer", "after_train_iter"] == 4
    assert 0 < clock.seconds["optimizer", "after_train_iter"] < 0.02
    assert sum(clock.seconds.values()) <= clock.total


def test_a_wrapper_has_the_time_before_and_after_what_it_wraps():
    kernel = plain_kernel({"around": Around()})
    clock = Clock(kernel.state.bus)
    kernel.run()
    assert clock.seconds["around", "train_step"] >= 0.04
    assert clock.seconds["model", "train_step"] < 0.02


def test_a_failure_passes_through_the_clock_and_is_attributed():
    @plugin
    class Fails:
        """Fails."""

        @hookimpl(wrapper=True)
        def train_step(self):
            yield
            raise ValueError("no")

    kernel = plain_kernel({"fails": Fails()})
    clock = Clock(kernel.state.bus)
    with pytest.raises(ValueError, match="no") as error:
        kernel.run()
    assert any("plugin 'fails'" in note for note in error.value.__notes__)
    assert clock.calls["fails", "train_step"] == 1


def test_a_stopped_clock_counts_no_more_and_the_functions_are_the_original_ones():
    kernel = plain_kernel({})
    bus = kernel.state.bus
    before = [impl.function for impl in bus._caller("train_step").get_hookimpls()]
    clock = Clock(bus)
    clock.stop()
    total = clock.total
    assert [impl.function for impl in bus._caller("train_step").get_hookimpls()] == before
    kernel.run()
    assert not clock.calls
    assert clock.total == total


@pytest.mark.parametrize("first", ["clock", "trace"])
def test_a_clock_and_a_trace_end_in_any_order(tmp_path, first):
    kernel = plain_kernel({}, work_dir=tmp_path)
    out = io.StringIO()
    if first == "trace":
        tracer = Tracer(kernel.state, 2, out)
        clock = Clock(kernel.state.bus)
    else:
        clock = Clock(kernel.state.bus)
        tracer = Tracer(kernel.state, 2, out)
    kernel.run()
    assert sum(call.name == "train_step" and not call.plugin for call in tracer.calls) == 2
    assert clock.calls["model", "train_step"] == 4
    clock.stop()
    again = len(tracer.calls)
    kernel.state.hook.before_run(run=kernel.state)
    assert len(tracer.calls) == again


def test_a_run_under_a_clock_is_the_same_run(tmp_path):
    kernel = plain_kernel({"model": PlainModel(noise=0)}, work_dir=tmp_path / "a")
    Clock(kernel.state.bus)
    clocked = kernel.run().model.value
    assert clocked == plain_run({"model": PlainModel(noise=0)}, work_dir=tmp_path / "b").model.value
