import math
from types import SimpleNamespace

import pytest
import torch
from detkernel import ConfigError, Span, UserError, hookimpl, option, plugin, state
from detkernel.metrics import Better
from detkernel_detection.testing import HookContract, tiny_kernel, tiny_run
from detkernel_optim.plateau import Plateau
from detkernel_optim.schedules import (
    Chain,
    Constant,
    Cosine,
    Exponential,
    Multistep,
    OneCycle,
    Poly,
    Product,
    Schedule,
    Stage,
)
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
    linear = curve(Constant(warmup=Span(6, "iters"), warmup_factor=0.5))
    assert linear[:7] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert curve(Constant(warmup=Span(1, "iters"), warmup_factor=0.5))[:2] == [0.5, 1]
    constant = curve(Constant(warmup=Span(1, "epochs"), warmup_factor=0.1, warmup_kind="constant"))
    assert constant == [0.1] * 10 + [1] * 30
    quadratic = curve(Constant(warmup=Span(4, "iters"), warmup_factor=0.0, warmup_kind="quadratic"))
    assert quadratic[:5] == pytest.approx([1 / 16, 4 / 16, 9 / 16, 1, 1])
    exponential = curve(Constant(warmup=Span(3, "iters"), warmup_factor=0.01, warmup_kind="exponential"))
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
    schedule = Multistep(milestones=[Span(3, "iters")], warmup=Span(3, "iters"), warmup_factor=0.5)
    tiny_run({"optimizer": Sgd(lr=0.2), "schedule": schedule, "look": look}, work_dir=tmp_path)
    assert look.rates == pytest.approx([0.1, 0.15, 0.2, 0.02])


def test_two_schedules_are_an_error(tmp_path):
    with pytest.raises(UserError, match="2 schedules set the learning rate: one and two"):
        tiny_run({"optimizer": Sgd(lr=0.1), "one": Cosine(), "two": Poly()}, work_dir=tmp_path)


def test_every_other_option_of_the_curves():
    gammas = curve(Multistep(milestones=[Span(1, "epochs"), Span(2, "epochs")], gamma=0.3))
    assert gammas == pytest.approx([1.0] * 10 + [0.3] * 10 + [0.09] * 20)
    assert curve(Poly(power=2, end=0.2)) == pytest.approx([0.2 + 0.8 * (1 - n / 40) ** 2 for n in range(40)])
    assert curve(Exponential(gamma=0.5)) == pytest.approx([0.5 ** (n / 10) for n in range(40)])
    short = curve(Cosine(length=Span(2, "epochs"), end=0.5))
    assert short == pytest.approx([0.5 + 0.25 * (1 + math.cos(math.pi * min(n, 20) / 20)) for n in range(40)])
    warm = curve(Cosine(by="epochs", warmup=Span(5, "iters"), warmup_factor=0.2))
    assert warm[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])  # by iteration, though the cosine goes by epochs
    assert warm[10:20] == [pytest.approx((1 + math.cos(math.pi / 4)) / 2)] * 10


def chained(*stages, **options):
    return Chain(stages=[Stage(schedule=schedule, until=until, factor=factor) for schedule, until, factor in stages])


def test_a_chain_is_torchs_sequence():
    ours = chained(
        (Constant(warmup=Span(6, "iters"), warmup_factor=0.2), Span(1, "epochs"), 1.0),
        (Exponential(gamma=0.8**10), Span(25, "iters"), 1.0),
        (Cosine(end=0.1), None, 1.0),
    )

    def sequence(optimizer):
        scheduler = torch.optim.lr_scheduler
        parts = [
            scheduler.LinearLR(optimizer, start_factor=0.2, total_iters=5),
            scheduler.ExponentialLR(optimizer, gamma=0.8),
            scheduler.LambdaLR(optimizer, lambda n: 0.1 + 0.9 * (1 + math.cos(math.pi * n / 15)) / 2),
        ]
        return scheduler.SequentialLR(optimizer, parts, milestones=[10, 25])

    assert curve(ours) == pytest.approx(torchs(sequence))


def test_a_stage_has_a_factor_and_counts_epochs_from_its_beginning():
    restarts = chained((Cosine(), Span(20, "iters"), 1.0), (Cosine(by="epochs"), Span(4, "epochs"), 0.5))
    assert curve(restarts) == pytest.approx(
        [(1 + math.cos(math.pi * n / 20)) / 2 for n in range(20)] + [0.5] * 10 + [0.25] * 10
    )


def test_a_product_is_torchs_chained_scheduler():
    def both(optimizer):
        scheduler = torch.optim.lr_scheduler
        parts = [
            scheduler.MultiStepLR(optimizer, [20, 30], gamma=0.5),
            scheduler.ExponentialLR(optimizer, gamma=0.9),
        ]
        return scheduler.ChainedScheduler(parts)

    multistep = Multistep(milestones=[Span(20, "iters"), Span(3, "epochs")], gamma=0.5)
    assert curve(Product(schedules=[multistep, Exponential(gamma=0.9**10)])) == pytest.approx(torchs(both))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages: expected at least one"),
        ([(Constant(), None, 1.0), (Cosine(), None, 1.0)], "`until` in each but the last"),
        ([(Plateau(metric="x"), None, 1.0)], "plateau goes by validations"),
    ],
)
def test_a_chain_that_is_none(stages, message):
    with pytest.raises(ValueError, match=message):
        chained(*stages)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(Constant(), Span(3, "iters"), 1.0), (Cosine(), Span(3, "iters"), 1.0)], r"stages.1: ends at 3 iters, where"),
        ([(Constant(), Span(3, "iters"), 1.0), (Cosine(), Span(4, "iters"), 1.0)], r"stages.1: .* before the end of"),
    ],
)
def test_stages_that_do_not_fit_the_run(stages, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny_run({"optimizer": Sgd(lr=0.1), "schedule": chained(*stages)}, until="8 iters", work_dir=tmp_path)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            Cosine(warmup=Span(2, "epochs"), warmup_factor=0.2),
            "the warmup of 2 epochs (8 iterations) does not end within 6 iterations: the rate gets to 0.771",
        ),
        (Constant(warmup=Span(7, "iters")), "the warmup of 7 iters (7 iterations) does not end within 6 iterations"),
        (Multistep(milestones=[Span(2, "epochs")]), "the milestone at 2 epochs is not within 6 iterations"),
        (
            chained((Constant(warmup=Span(4, "iters")), Span(2, "iters"), 1.0), (Cosine(), None, 1.0)),
            "the warmup of 4 iters (4 iterations) does not end within 2 iterations",
        ),
        (
            chained((Constant(), Span(2, "epochs"), 1.0), (Cosine(), None, 1.0)),
            "stage 2 begins at iteration 8, after the run's end",
        ),
        (
            Product(schedules=[Constant(warmup=Span(9, "iters")), Cosine()]),
            "the warmup of 9 iters (9 iterations) does not end within 6 iterations",
        ),
    ],
)
def test_what_does_not_fit_into_the_run_is_said_by_check_and_run(schedule, message, tmp_path, caplog):
    def kernel():
        return tiny_kernel({"optimizer": Sgd(lr=0.1), "schedule": schedule}, until="6 iters", work_dir=tmp_path)

    for go in (lambda: kernel().check(), lambda: kernel().run()):
        caplog.clear()
        go()
        assert caplog.text.count(f"schedule: {message}") == 1


def test_what_fits_is_not_warned_of(tmp_path, caplog):
    schedule = Multistep(milestones=[Span(5, "iters")], warmup=Span(6, "iters"))
    tiny_run({"optimizer": Sgd(lr=0.1), "schedule": schedule}, until="6 iters", work_dir=tmp_path)
    assert not caplog.text


@plugin
class Rates:
    """Keeps the rate of each iteration, and multiplies it once, as a plugin of a user's might."""

    at: int = state(default=3)
    factor: float = state(default=0.5)
    rates: list = state(factory=list)

    @hookimpl
    def before_optimizer_step(self, run):
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    @hookimpl
    def after_train_iter(self, run):
        if run.iter == self.at:
            for group in run.optimizer.param_groups:
                group["lr"] *= self.factor


def test_a_rate_that_a_plugin_has_lowered_stays_so(tmp_path):
    rates = Rates()
    plugins = {"optimizer": Sgd(lr=0.8), "schedule": Cosine(), "rates": rates}
    tiny_run(plugins, until="6 iters", work_dir=tmp_path)
    full = [0.8 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    assert rates.rates == pytest.approx([*full[:3], *(rate / 2 for rate in full[3:])])


@plugin
class Lowering(Multistep):
    """A schedule beside which somebody lowers the rate."""

    @hookimpl(trylast=True)
    def after_train_iter(self, run):
        if run.iter == 2:
            for group in run.optimizer.param_groups:
                group["lr"] *= 0.3


class TestLoweredRatesResume(HookContract):
    name = "schedule"

    def plugin(self):
        return Lowering(milestones=[Span(4, "iters")], warmup=Span(2, "iters"))


@plugin
class Score:
    """Publishes a metric after each validation."""

    values: list = option(factory=list, help="of the validations, in their order")
    better: Better | None = option(default="higher", help="the direction")

    @hookimpl
    def after_val_epoch(self, run):
        run.metrics.publish("score", self.values[run.iter - 1], better=self.better)


VALUES = [0.1, 0.3, 0.2, 0.3, 0.31, 0.3, 0.3, float("nan"), 0.2, 0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]


@pytest.mark.parametrize("better", ["higher", "lower"])
@pytest.mark.parametrize(
    "options", [{"patience": 1}, {"patience": 0, "cooldown": 2}, {"patience": 2, "min_delta": 0.05, "end": 0.3}]
)
def test_a_plateau_is_torchs(options, better, tmp_path):
    values = VALUES if better == "higher" else [-value for value in VALUES]
    rates = Rates()
    rates.at = 0
    plateau = Plateau(metric="score", gamma=0.5, **options)
    plugins = {"optimizer": Sgd(lr=1.0), "schedule": plateau, "score": Score(values=values, better=better)}
    tiny_run({**plugins, "rates": rates}, until="16 iters", validate="1 iter", work_dir=tmp_path)
    expected = []
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs_own = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max" if better == "higher" else "min", factor=0.5, patience=options["patience"],
        threshold=options.get("min_delta", 0), threshold_mode="abs", cooldown=options.get("cooldown", 0),
        min_lr=options.get("end", 0), eps=0,
    )  # fmt: skip
    for value in values:
        expected.append(optimizer.param_groups[0]["lr"])
        torchs_own.step(value)
    assert rates.rates == pytest.approx(expected)
    assert len(set(rates.rates)) > 1


def test_a_plateau_goes_by_its_rule_where_it_has_one(tmp_path):
    def last(rule, better):
        values, schedule = [0.1 * n for n in range(9)], Plateau(metric="score", patience=1, gamma=0.5, rule=rule)
        plugins = {"optimizer": Sgd(lr=1.0), "schedule": schedule, "score": Score(values=values, better=better)}
        return tiny_run(plugins, until="8 iters", validate="1 iter", work_dir=tmp_path).scalars["lr"]()

    assert last(None, "higher") == 1
    assert last("lower", "higher") == last("lower", None) == last(None, "lower") == pytest.approx(0.125)
    with pytest.raises(ConfigError, match="'score' does not say whether higher or lower is better"):
        last(None, None)


def test_a_plateau_needs_validations_and_its_metric(tmp_path):
    plugins = {"optimizer": Sgd(lr=1.0), "schedule": Plateau(metric="scor"), "score": Score(values=[0.1] * 9)}
    with pytest.raises(ConfigError, match=r"metric: there are no validations to look at; set run.validate"):
        tiny_run(plugins, work_dir=tmp_path)
    with pytest.raises(ConfigError, match="metric: no metric is named 'scor', did you mean 'score'"):
        tiny_kernel(plugins, validate="1 iter", work_dir=tmp_path).check()


@plugin
class Scored(Plateau):
    """Has a metric of its own, which never gets better."""

    @hookimpl(wrapper=True, specname="after_val_epoch")
    def _publish(self, run):
        run.metrics.publish("score", 1.0, better="higher")
        yield


class TestPlateausResume(HookContract):
    """With a validation after four of six iterations, and a fall behind it."""

    name = "schedule"

    def plugin(self):
        made = Scored(metric="score", patience=0, gamma=0.5, cooldown=1)
        made._best = 2.0
        return made


def test_schedules_are_parts_of_chain_for_the_config():
    from detkernel_optim.schedules import Curve

    assert issubclass(Schedule, Curve)


def test_one_cycle_starts_at_the_share_that_is_asked_for():
    found = curve(OneCycle(rise=0.5, start=0.2))
    assert found[0] == pytest.approx(0.2)
    assert found[10] == pytest.approx(0.6), "half of the way up"
