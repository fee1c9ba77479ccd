"""What a step is taken with: the mean of its iterations, finite or not at all."""

import math

import pytest
import torch
from detkernel import UserError, hookimpl, plugin, state
from detkernel.testing import Recorder
from detkernel_detection.testing import HookContract, TinyDetector, tiny_kernel, tiny_run
from detkernel_optim.ema import Ema
from detkernel_optim.gradients import Norms
from detkernel_optim.schedules import Cosine
from detkernel_optim.stepping import Adamw, Sgd

NAN, INF = float("nan"), float("inf")


def trained(run):
    return [p for p in run.bare_model.parameters() if p.requires_grad]


def flat(gradients):
    return torch.cat([gradient.flatten() for gradient in gradients]).clone()


@plugin
class LowScale:
    """Begins with a loss scale under which nothing overflows."""

    @hookimpl(trylast=True)
    def before_run(self, run):
        optimizer = run.bus["optimizer"]
        if optimizer._scaler is not None:
            optimizer._scaler = torch.amp.GradScaler("cpu", init_scale=64.0)


@plugin(priority="very_high")
class Compare:
    """Compares the gradient of a step with the mean of what each iteration has by itself."""

    own: list = state(factory=list)
    steps: list = state(factory=list)

    @hookimpl
    def after_train_iter(self, run, losses):
        loss = sum(value for name, value in losses.items() if "loss" in name)
        self.own.append(flat(torch.autograd.grad(loss, trained(run), retain_graph=True)))

    @hookimpl
    def before_optimizer_step(self, run):
        got = flat(p.grad for p in trained(run))
        torch.testing.assert_close(got, torch.stack(self.own).mean(0), rtol=5e-3, atol=1e-4)
        self.steps.append((run.iter, len(self.own)))
        self.own.clear()


@plugin
class HalfSgd(Sgd):
    """Steps where the device says fp16."""

    @hookimpl
    def setup(self, run):
        run.precision = "fp16"


@pytest.mark.parametrize("kind", [Sgd, HalfSgd])
def test_a_step_has_the_mean_of_its_iterations_also_the_last_over_the_end_of_an_epoch(kind, tmp_path):
    compare = Compare()
    optimizer = kind(lr=0.01, accumulate=3)
    plugins = {"optimizer": optimizer, "scale": LowScale(), "compare": compare}
    tiny_run(plugins, until="8 iters", work_dir=tmp_path)
    assert compare.steps == [(3, 3), (6, 3), (8, 2)]  # an epoch has four


@plugin
class Resume:
    """Goes on from what another run had become."""

    before: object = state(default=None)

    @hookimpl(trylast=True)
    def before_run(self, run):
        run.load_state_dict(self.before.state_dict())
        run.model.load_state_dict(self.before.model.state_dict())
        old, new = self.before.bus["optimizer"], run.bus["optimizer"]
        new.load_state_dict(old.state_dict())
        new.load_rank_state_dict(old.rank_state_dict())


def resumed(before, optimizer, until, tmp_path):
    compare, resume = Compare(), Resume()
    resume.before = before
    tiny_run({"optimizer": optimizer, "compare": compare, "resume": resume}, until=until, work_dir=tmp_path)
    return compare.steps


def test_a_run_made_longer_begins_a_new_window_where_the_last_was_stepped(tmp_path):
    before = tiny_run({"optimizer": Sgd(lr=0.01, accumulate=3)}, until="5 iters", work_dir=tmp_path)
    assert resumed(before, Sgd(lr=0.01, accumulate=3), "10 iters", tmp_path) == [(8, 3), (10, 2)]


def test_a_run_stopped_in_a_window_goes_on_in_it(tmp_path):
    @plugin
    class Stop:
        """Stops after two."""

        @hookimpl
        def after_train_iter(self, run):
            if run.iter == 2:
                run.stop("enough")

    stopped = tiny_run({"optimizer": Sgd(lr=0.01, accumulate=3), "stop": Stop()}, until="9 iters", work_dir=tmp_path)
    compare, resume = Compare(), Resume()
    resume.before = stopped
    compare.own = [flat(p.grad for p in trained(stopped)) / 2] * 2  # their mean, as that of both
    tiny_run(
        {"optimizer": Sgd(lr=0.01, accumulate=3), "compare": compare, "resume": resume},
        until="4 iters",
        work_dir=tmp_path,
    )
    assert compare.steps == [(3, 3), (4, 1)]


def test_gradients_of_another_number_of_processes_are_dropped(tmp_path, caplog):
    optimizer = Sgd(lr=0.01, accumulate=4)
    run = tiny_run({"optimizer": optimizer}, until="2 iters", work_dir=tmp_path)
    saved = {**optimizer.state_dict(), "window": 2, "processes": 3}
    optimizer.load_state_dict(saved)
    optimizer.load_rank_state_dict({})
    assert "gradients of 2 iterations, accumulated by 3 processes, are dropped: there are 1 now" in caplog.text
    assert optimizer.state_dict()["window"] == 0
    assert run.world_size == 1


def spoil(run, at, value=NAN):
    """Every gradient of the head's bias becomes a value in some iterations, and the losses stay finite."""
    bias = run.bare_model[3].bias
    bias.register_hook(lambda gradient: torch.full_like(gradient, value) if run.iter in at else gradient)


@plugin
class Spoil:
    """Makes gradients invalid in some iterations."""

    at: tuple = state(factory=tuple)
    value: float = state(default=NAN)

    @hookimpl
    def before_run(self, run):
        spoil(run, self.at, self.value)


def spoiled(*at, value=NAN):
    made = Spoil()
    made.at, made.value = at, value
    return made


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}, {"accumulate": 3}])
def test_an_invalid_gradient_under_finite_losses_stops_the_run_before_the_step(options, value, tmp_path):
    kernel = tiny_kernel(
        {"optimizer": Adamw(lr=0.01, **options), "spoil": spoiled(3, value=value)}, until="6 iters", work_dir=tmp_path
    )
    message = (
        r"iteration 3: the norm of the gradients is (nan|inf), and each loss finite \(images \d, \d\); not finite are "
        r"the gradients of 3.bias, of 6\. .*optimizer.invalid_gradients: skip.* The weights were not stepped with it"
    )
    with pytest.raises(UserError, match=message):
        kernel.run()
    assert all(bool(p.isfinite().all()) for p in kernel.state.model.parameters())


def test_an_invalid_loss_is_named(tmp_path):
    @plugin
    class Break:
        """Makes a loss infinite."""

        @hookimpl(wrapper=True)
        def train_step(self):
            losses = yield
            return {**losses, "loss_bbox": losses["loss_bbox"] * INF}

    with pytest.raises(UserError, match=r"iteration 1: .*, and loss_bbox is (inf|nan) \(images"):
        tiny_run({"optimizer": Sgd(lr=0.1), "break": Break()}, work_dir=tmp_path)


@plugin(priority="low")
class Watch:
    """Keeps the weights and the rate of every iteration."""

    weights: list = state(factory=list)
    rates: list = state(factory=list)

    @hookimpl
    def after_train_iter(self, run):
        self.weights.append(flat(p.detach() for p in run.model.parameters()))
        self.rates.append(run.optimizer.param_groups[0]["lr"])


def test_a_step_left_out_is_none(tmp_path, caplog):
    recorder, watch, ema = Recorder(), Watch(), Ema(decay=0.5, ramp=0)
    plugins = {
        "optimizer": Adamw(lr=0.01, invalid_gradients="skip", clip_norm=1),
        "schedule": Cosine(),
        "ema": ema,
        "spoil": spoiled(2, 3),
        "watch": watch,
        "model": TinyDetector(dropout=0),
    }
    run = tiny_run(plugins, until="5 iters", work_dir=tmp_path, recorder=recorder)
    still = [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert still == [True, True, False, False]
    assert recorder.names("optimizer_step").count("before_optimizer_step") == 5
    assert recorder.names("optimizer_step").count("after_optimizer_step") == 3
    assert ema.state_dict()["steps"] == 3
    assert watch.rates == pytest.approx([0.01 * (1 + math.cos(math.pi * n / 5)) / 2 for n in range(5)])
    assert run.scalars["skipped_steps"]() == 2
    assert math.isfinite(run.scalars["grad_norm"]())
    assert caplog.text.count("this step is left out") == 1  # not for each of a row
    again = Sgd(lr=0.1, invalid_gradients="skip")
    other = tiny_run({"optimizer": again}, until="1 iters", work_dir=tmp_path)
    again.load_state_dict({**again.state_dict(), "skipped": plugins["optimizer"].state_dict()["skipped"]})
    assert other.scalars["skipped_steps"]() == 2  # it goes on in a resumed run


def test_a_run_in_which_every_step_is_left_out_ends(tmp_path):
    optimizer = Sgd(lr=0.1, invalid_gradients="skip")
    with pytest.raises(UserError, match="the last 50 steps were left out: nothing is learned any more"):
        tiny_run({"optimizer": optimizer, "spoil": spoiled(*range(3, 99))}, until="99 iters", work_dir=tmp_path)


def test_a_step_that_fp16_leaves_out_is_none(tmp_path):
    @plugin
    class Overflow:
        """Losses whose scaled gradients are too large for float32, in one iteration."""

        @hookimpl(wrapper=True)
        def train_step(self, run):
            losses = yield
            return {name: value * (1e37 if run.iter == 1 else 1) for name, value in losses.items()}

    recorder, watch, ema = Recorder(), Watch(), Ema(decay=0.5, ramp=0)
    optimizer = HalfSgd(lr=0.01)
    plugins = {"optimizer": optimizer, "ema": ema, "overflow": Overflow(), "watch": watch, "scale": LowScale()}
    run = tiny_run(plugins, until="4 iters", work_dir=tmp_path, recorder=recorder)
    still = [torch.equal(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]
    assert still == [True, False, False]
    assert recorder.names("optimizer_step").count("after_optimizer_step") == 3
    assert ema.state_dict()["steps"] == 3
    assert run.scalars["skipped_steps"]() == 1
    assert optimizer.state_dict()["scaler"]["scale"] == 32


def test_fp16_clips_what_is_unscaled(tmp_path):
    norms = []

    @plugin
    class Look:
        """Looks at the gradients of a step before and after they are clipped."""

        @hookimpl
        def before_optimizer_step(self, run):
            norms.append(flat(p.grad for p in run.model.parameters()).norm().item())

        @hookimpl
        def after_optimizer_step(self, run):
            norms.append(flat(p.grad for p in run.model.parameters()).norm().item())

    optimizer = HalfSgd(lr=0.01, clip_norm=0.25)
    tiny_run({"optimizer": optimizer, "look": Look(), "scale": LowScale()}, until="1 iters", work_dir=tmp_path)
    assert 0.25 < norms[0] < 100
    assert norms[1] == pytest.approx(0.25, rel=1e-4)


@plugin
class Broken(Sgd):
    """Has invalid gradients in two of six iterations."""

    @hookimpl
    def before_optimizer_step(self, run):
        if run.iter in (2, 5):
            run.model[3].bias.grad.fill_(NAN)


class TestLeavingStepsOutResumes(HookContract):
    name = "optimizer"

    def plugin(self):
        return Broken(lr=0.05, invalid_gradients="skip", accumulate=1)


class TestWindowsResume(HookContract):
    """Of six iterations, the last window has two."""

    name = "optimizer"

    def plugin(self):
        return Adamw(lr=0.05, accumulate=4, clip_norm=0.1)


def test_norms_on_a_device_are_asked_for_together():
    norms = Norms()
    for iteration in range(1, 50):
        norms.add(iteration, torch.tensor(NAN if iteration == 7 else 1.0))
    message = "iteration 7: the norm of the gradients was nan, and the weights have been stepped with it"
    for ask in (lambda: norms.add(50, torch.tensor(1.0)), norms.look, norms.look):  # also of those who ask later
        with pytest.raises(UserError, match=message):
            ask()
    valid = Norms()
    for iteration in range(1000):
        valid.add(iteration, torch.tensor(1.0))
    valid.look()


def test_every_backward_pass_is_told_with_the_sum_so_far(tmp_path):
    seen = []

    @plugin
    class Look:
        """Looks at the gradients of each backward pass."""

        @hookimpl
        def after_backward(self, run):
            seen.append(("backward", run.iter, flat(p.grad for p in trained(run))))

        @hookimpl
        def before_optimizer_step(self, run):
            seen.append(("step", run.iter, flat(p.grad for p in trained(run))))

    optimizer = Sgd(lr=0.01, accumulate=2, clip_norm=1e-3)
    tiny_run({"optimizer": optimizer, "look": Look()}, until="2 iters", work_dir=tmp_path)
    assert [(event, iteration) for event, iteration, _ in seen] == [("backward", 1), ("backward", 2), ("step", 2)]
    torch.testing.assert_close(seen[1][2], 2 * seen[2][2])


class LookedAt(Norms):
    """Writes down the iterations in which it is asked."""

    def __init__(self, run):
        super().__init__()
        self.run, self.iterations = run, []

    def look(self):
        self.iterations.append(self.run.iter)


@plugin
class Asks:
    """Puts it in the place of the optimizer's, and saves and logs in the midst of the run."""

    norms: object = state()
    optimizer: object = state()

    @hookimpl(trylast=True)
    def before_run(self, run):
        self.optimizer._norms = self.norms = LookedAt(run)

    @hookimpl(trylast=True)
    def after_train_iter(self, run):
        if run.iter == 1:
            self.optimizer.before_save()
        if run.iter == 2:
            self.optimizer.after_log_line()


def test_norms_are_looked_at_wherever_the_device_is_waited_for_and_at_the_end(tmp_path):
    asks = Asks()
    asks.optimizer = Sgd(lr=0.01)
    plugins = {"optimizer": asks.optimizer, "asks": asks}
    tiny_run(plugins, until="5 iters", validate="3 iters", work_dir=tmp_path)
    assert asks.norms.iterations == [1, 2, 3, 5, 5], "the end, and its validation"


def test_each_row_of_steps_that_are_left_out_is_told_once_by_its_first(tmp_path, caplog):
    plugins = {"optimizer": Sgd(lr=0.01, invalid_gradients="skip"), "spoil": spoiled(2, 3, 5, 6, 7)}
    tiny_run(plugins, until="8 iters", work_dir=tmp_path)
    told = [line.split(":")[0][-len("iteration 2") :] for line in caplog.messages if "this step is left out" in line]
    assert told == ["iteration 2", "iteration 5"]
