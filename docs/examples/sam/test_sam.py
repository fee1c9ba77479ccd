import copy

import pytest
import torch
from detkernel import hookimpl, plugin, state
from detkernel_detection.testing import HookContract, TinyDetector, tiny_run
from detkernel_optim.ema import Ema
from detkernel_optim.schedules import Multistep
from sam import Sam


@plugin
class Look:
    """Keeps the model and the batch from before a step, and the gradient that it is taken with."""

    before: object = state()
    batch: object = state()
    gradient: object = state()

    @hookimpl
    def before_train_iter(self, run, batch):
        self.before, self.batch = copy.deepcopy(run.model), batch

    @hookimpl
    def before_optimizer_step(self, run):
        self.gradient = [parameter.grad.clone() for parameter in run.model.parameters()]


def gradient(run, model, batch):
    losses = run.bus["model"].train_step(run=run, model=model, batch=batch)
    return torch.autograd.grad(sum(losses.values()), list(model.parameters()))


def test_the_step_is_taken_with_the_gradient_of_the_worst_weights_nearby(tmp_path):
    look = Look()
    plugins = {"optimizer": Sam(lr=0.1, momentum=0, rho=0.5), "look": look, "model": TinyDetector(dropout=0)}
    run = tiny_run(plugins, until="1 iters", work_dir=tmp_path)
    near = copy.deepcopy(look.before)
    own = gradient(run, near, look.batch)
    norm = torch.cat([one.flatten() for one in own]).norm()
    with torch.no_grad():
        for weight, one in zip(near.parameters(), own, strict=True):
            weight += 0.5 * one / norm
    expected = gradient(run, near, look.batch)
    assert not torch.allclose(own[-1], expected[-1])
    rows = zip(look.gradient, expected, run.model.parameters(), look.before.parameters(), strict=True)
    for got, wanted, after, before in rows:
        torch.testing.assert_close(got, wanted)
        torch.testing.assert_close(after, before - 0.1 * wanted)


def test_averages_and_a_schedule_go_with_it(tmp_path):
    ema = Ema(decay=0.5, ramp=0)
    plugins = {"optimizer": Sam(lr=0.1), "schedule": Multistep(milestones=["3 iters"]), "ema": ema}
    run = tiny_run(plugins, until="4 iters", validate="every 2 iters", work_dir=tmp_path)
    assert ema.state_dict()["steps"] == 4
    assert run.scalars["lr"]() == pytest.approx(0.01)


class TestContract(HookContract):
    name = "optimizer"

    def plugin(self):
        return Sam(lr=0.05, rho=0.1)
