import math
from types import SimpleNamespace

import pytest
import torch
from detkernel import Span, UserError, hookimpl, plugin, state
from detkernel_detection.testing import tiny_run
from detkernel_optim.schedules import Constant, Cosine, Exponential, Multistep, OneCycle, Poly
from detkernel_optim.stepping import Sgd

RUN = SimpleNamespace(max_iters=40, epoch_length=10)


def curve(schedule, run=RUN):
    return [schedule.factor(run, iteration) for iteration in range(run.max_iters)]


def torchs(make, lr=1.0, steps=40):
    """What a schedule of torch gives, stepped in every iteration."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_multistep_in_epochs_and_iterations():
    milestones = [Span(2, "epochs"), Span(35, "iters")]
    expected = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [20, 35]))
    assert curve(Multistep(milestones=milestones)) == pytest.approx(expected)


def test_cosine_is_torchs():
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, eta_min=0.1))
    assert curve(Cosine(end=0.1)) == pytest.approx(expected)


def test_poly_is_torchs():
    expected = torchs(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 40, power=0.9))
    assert curve(Poly(power=0.9)) == pytest.approx(expected)


def test_exponential_is_torchs_by_epoch():
    expected = torchs(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), steps=4)
    assert curve(Exponential(gamma=0.5, by="epochs"))[::10] == pytest.approx(expected)


def test_one_cycle_rises_and_falls():
    found = curve(OneCycle(rise=0.25, start=0.04, end=0.01))
    assert found[0] == pytest.approx(0.04)
    assert found[10] == max(found) == pytest.approx(1)
    assert found == sorted(found[:10]) + sorted(found[10:], reverse=True)
    assert found[25] == pytest.approx(0.01 + 0.99 * (1 + math.cos(math.pi / 2)) / 2)


def test_warmups():
    linear = curve(Constant(warmup=Span(5, "iters"), warmup_factor=0.5))
    assert linear[:6] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1])
    constant = curve(Constant(warmup=Span(1, "epochs"), warmup_factor=0.1, warmup_kind="constant"))
    assert constant == [0.1] * 10 + [1] * 30
    exponential = curve(Constant(warmup=Span(2, "iters"), warmup_factor=0.01, warmup_kind="exponential"))
    assert exponential[:3] == pytest.approx([0.01, 0.1, 1])
    with pytest.raises(ValueError, match="must begin above 0"):
        Constant(warmup_kind="exponential", warmup_factor=0)


def test_by_epochs_changes_only_between_epochs():
    found = curve(Cosine(by="epochs"))
    assert [len(set(found[n : n + 10])) for n in range(0, 40, 10)] == [1, 1, 1, 1]
    assert len(set(found)) == 4


def test_the_rate_of_each_iteration_is_set_before_it(tmp_path):
    @plugin
    class Look:
        """Looks at the learning rate of each step."""

        rates: list = state(factory=list)

        @hookimpl
        def before_optimizer_step(self, run):
            self.rates.append(run.optimizer.param_groups[0]["lr"])

    look = Look()
    schedule = Multistep(milestones=[Span(3, "iters")], warmup=Span(2, "iters"), warmup_factor=0.5)
    tiny_run({"optimizer": Sgd(lr=0.2), "schedule": schedule, "look": look}, work_dir=tmp_path)
    assert look.rates == pytest.approx([0.1, 0.15, 0.2, 0.02])


def test_two_schedules_are_an_error(tmp_path):
    with pytest.raises(UserError, match="2 schedules set the learning rate: one and two"):
        tiny_run({"optimizer": Sgd(lr=0.1), "one": Cosine(), "two": Poly()}, work_dir=tmp_path)
