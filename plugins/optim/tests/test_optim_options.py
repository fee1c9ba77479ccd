"""Each option of the optimizers and of `ema` by its effect, against values worked out by hand or by torch."""

import itertools
import math

import pytest
import torch
from detkernel import ConfigError, UserError, hookimpl, plugin, state
from detkernel.config import load
from detkernel_detection.testing import HookContract, TinyDetector, TinyLoader, tiny_kernel, tiny_run
from detkernel_optim.ema import Ema
from detkernel_optim.schedules import Cosine
from detkernel_optim.stepping import Adam, Adamw, Group, LayerDecay, Sgd, TorchOptimizer

NAMES = ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "3.weight", "3.bias"]


def settings(optimizer, tmp_path, **plugins):
    """(learning rate, weight decay) by the parameter's name."""
    run = tiny_run({"optimizer": optimizer, **plugins}, work_dir=tmp_path, until="1 iters")
    names = {id(p): name for name, p in run.model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]}
    return run, dict(sorted(found.items()))


def shown(run):
    return {name: ask() for name, ask in run.scalars.items() if name.startswith("lr")}


@pytest.mark.parametrize(
    ("make", "twin"),
    [
        (lambda: Sgd(lr=0.05, momentum=0.5), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5)),
        (lambda: Sgd(lr=0.05, momentum=0), lambda p: torch.optim.SGD(p, lr=0.05)),
        (
            lambda: Adam(lr=0.01, betas=(0.5, 0.7), eps=1e-2, weight_decay=0.3),
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.7), eps=1e-2, weight_decay=0.3),
        ),
        (
            lambda: Adamw(lr=0.01, betas=(0.5, 0.7), eps=1e-2, weight_decay=0.3),
            lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.5, 0.7), eps=1e-2, weight_decay=0.3),
        ),
        (
            lambda: TorchOptimizer(name="NAdam", lr=0.01, weight_decay=0.3, args={"momentum_decay": 0.1}),
            lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.3, momentum_decay=0.1),
        ),
    ],
    ids=["sgd", "no_momentum", "adam", "adamw", "by_name"],
)
def test_options_of_each_optimizer_are_torchs(make, twin, tmp_path):
    @plugin(priority="low")
    class Beside:
        """Steps a copy of the weights with torch's own optimizer and the same gradients."""

        copies: list = state(factory=list)
        other: object = state(default=None)

        @hookimpl(trylast=True)
        def before_run(self, run):
            self.copies = [p.detach().clone().requires_grad_() for p in run.model.parameters()]
            self.other = twin(self.copies)

        @hookimpl
        def after_optimizer_step(self, run):
            for copy, p in zip(self.copies, run.model.parameters(), strict=True):
                copy.grad = p.grad.clone()
            self.other.step()

    beside = Beside()
    run = tiny_run({"optimizer": make(), "beside": beside}, work_dir=tmp_path, until="5 iters")
    for copy, p in zip(beside.copies, run.model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), copy.detach())


def test_weight_decay_of_norms_and_biases(tmp_path):
    one, two = (0.1, 0.5), (0.1, 0.25)
    _, found = settings(Sgd(lr=0.1, weight_decay=0.5, norm_weight_decay=0.25), tmp_path)
    assert found == dict(zip(sorted(NAMES), [one, one, two, two, one, one], strict=True))
    _, found = settings(Sgd(lr=0.1, weight_decay=0.5, bias_weight_decay=0.25), tmp_path)
    assert [found[name] for name in NAMES] == [one, two, one, two, one, two]


def test_the_first_pattern_that_matches_counts(tmp_path):
    groups = [Group(match="3.bias", lr_mult=0.5), Group(match="3.*", lr_mult=0.1, weight_decay_mult=3)]
    run, found = settings(Sgd(lr=0.1, weight_decay=0.5, groups=groups), tmp_path)
    assert found["3.bias"] == (0.05, 0.5)
    assert found["3.weight"] == pytest.approx((0.01, 1.5))
    assert found["0.0.bias"] == (0.1, 0.5)
    assert shown(run) == {"lr": 0.1, "lr_3.bias": 0.05, "lr_3.*": pytest.approx(0.01)}


def test_a_pattern_behind_others_that_match_all_of_it_is_an_error(tmp_path):
    groups = [Group(match="*", lr_mult=1), Group(match="3.*", lr_mult=0.1)]
    with pytest.raises(
        ConfigError, match=r"groups.1: '3\.\*' has no effect: the patterns before it match all of its 2"
    ):
        settings(Sgd(lr=0.1, groups=groups), tmp_path)


def test_the_log_shows_the_base_rate_and_each_other_one(tmp_path):
    backbone = Group(match="0.*", lr_mult=0.1)
    run, _ = settings(Sgd(lr=0.1, norm_weight_decay=0, weight_decay=0.1, groups=[backbone]), tmp_path)
    assert shown(run) == {"lr": 0.1, "lr_0.*": pytest.approx(0.01)}  # that of the first group is the backbone's
    everything = [Group(match="0.*", lr_mult=0), Group(match="*", lr_mult=0.5)]
    run, _ = settings(Sgd(lr=0.1, groups=everything), tmp_path, schedule=Cosine())
    assert shown(run) == {"lr": 0.05, "lr_0.*": 0}


@plugin
class Freeze:
    """Freezes the first layers, for some iterations or for good."""

    until: int = state(default=99)

    @hookimpl
    def prepare_model(self, run):
        run.model[0].requires_grad_(False)

    @hookimpl
    def before_train_iter(self, run):
        run.model[0].requires_grad_(run.iter >= self.until)


def test_rates_of_frozen_parameters_are_not_shown_and_patterns_for_them_are_warned_of(tmp_path, caplog):
    groups = [Group(match="0.*", lr_mult=0.1)]
    run, _ = settings(Sgd(lr=0.1, groups=groups), tmp_path, freeze=Freeze())
    assert shown(run) == {"lr": 0.1}
    assert "optimizer.groups: all 4 parameters that '0.*' matches are frozen" in caplog.text


def test_what_is_frozen_at_first_is_trained_once_it_is_not(tmp_path):
    seen = []

    @plugin(priority="low")
    class Watch:
        """Keeps a weight."""

        @hookimpl
        def after_train_iter(self, run):
            seen.append(run.model[0][0].weight.detach().clone())

    freeze = Freeze()
    freeze.until = 2
    tiny_run({"optimizer": Adamw(lr=0.1), "freeze": freeze, "watch": Watch()}, work_dir=tmp_path, until="4 iters")
    assert [torch.equal(a, b) for a, b in itertools.pairwise(seen)] == [True, False, False]


def test_a_base_batch_scales_the_rate_with_the_images_a_step(tmp_path):
    run, _ = settings(Sgd(lr=0.1, base_batch_size=16, accumulate=3), tmp_path)  # two images a batch
    assert shown(run) == {"lr": pytest.approx(0.1 * 2 * 3 / 16)}
    kernel = tiny_kernel({"optimizer": Sgd(lr=0.1, base_batch_size=1)}, work_dir=tmp_path)
    kernel.state.world_size = 4
    kernel.state.loaders["train"] = TinyLoader(None, 2, 0, shuffle=False)
    assert kernel.state.bus["optimizer"]._rate(kernel.state) == pytest.approx(0.8)


def test_a_base_batch_needs_a_loader_that_says_its_batch_size(tmp_path):
    class Mute(TinyLoader):
        batch_size = property(lambda self: None, lambda self, value: self.__dict__.update(size=value))

        def __len__(self):
            return 4

    @plugin
    class Data:
        """Has a loader that does not say."""

        @hookimpl
        def build_loader(self):
            from detkernel_detection.testing import TinyDataset

            dataset = TinyDataset()
            dataset.load()
            return Mute(dataset, 2, 0, shuffle=False)

    with pytest.raises(ConfigError, match="base_batch_size: the train loader, Mute, does not say its `batch_size`"):
        tiny_run({"optimizer": Sgd(lr=0.1, base_batch_size=1), "data": Data()}, work_dir=tmp_path)


def test_rates_fall_by_layer_towards_the_input(tmp_path):
    layers = LayerDecay(decay=0.5, layers=["0.0", "0.1"])
    run, found = settings(Sgd(lr=0.8, layer_decay=layers, groups=[Group(match="*.bias", lr_mult=2)]), tmp_path)
    rates = {name: lr for name, (lr, _) in found.items()}
    assert rates == pytest.approx(
        {"0.0.weight": 0.2, "0.0.bias": 0.4, "0.1.weight": 0.4, "0.1.bias": 0.8, "3.weight": 0.8, "3.bias": 1.6}
    )
    assert shown(run) == pytest.approx({"lr": 0.8, "lr_*.bias": 1.6, "lr_lowest": 0.2})
    _, found = settings(Sgd(lr=0.8, layer_decay=LayerDecay(decay=0.5, layers=["*.*"])), tmp_path)
    assert {name: lr for name, (lr, _) in found.items()} == pytest.approx(
        {"0.0.weight": 0.2, "0.0.bias": 0.2, "0.1.weight": 0.4, "0.1.bias": 0.4, "3.weight": 0.8, "3.bias": 0.8}
    )
    with pytest.raises(
        ConfigError,
        match=r"layers: no module with parameters is called 'backbone.body.\*' \(expected one of: 0, 0.0, 0.1, 3\)",
    ):
        settings(Sgd(lr=0.1, layer_decay=LayerDecay(decay=0.5)), tmp_path)


@pytest.mark.parametrize(
    "options", [{"clip_norm": 0.05}, {"clip_value": 0.01}, {"clip_norm": 0.05, "clip_value": 0.01}]
)
def test_clipping_is_torchs(options, tmp_path):
    pairs = []

    @plugin
    class Look:
        """Keeps the gradients before and after they are clipped."""

        before: list = state(factory=list)

        @hookimpl
        def before_optimizer_step(self, run):
            self.before = [p.grad.clone() for p in run.model.parameters()]

        @hookimpl
        def after_optimizer_step(self, run):
            pairs.append((self.before, [p.grad.clone() for p in run.model.parameters()]))

    run = tiny_run({"optimizer": Sgd(lr=0.1, **options), "look": Look()}, work_dir=tmp_path, until="2 iters")
    for before, after in pairs:
        parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in before]
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient.clone()
        if "clip_norm" in options:
            norm = torch.nn.utils.clip_grad_norm_(parameters, options["clip_norm"])
        if "clip_value" in options:
            torch.nn.utils.clip_grad_value_(parameters, options["clip_value"])
        for parameter, gradient in zip(parameters, after, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)
            assert parameter.grad is not None
    if "clip_norm" in options:
        assert run.scalars["grad_norm"]() == pytest.approx(float(norm))
    else:
        assert "grad_norm" not in run.scalars


def test_ema_ramps_up_and_takes_every_nth_step(tmp_path):
    weights, averages = [], []
    ema = Ema(decay=0.9, ramp=3, every=2)

    @plugin(priority="low")
    class Watch:
        """Keeps the weights and their averages."""

        @hookimpl
        def before_train_epoch(self, run):
            weights.append(run.model[3].weight.detach().clone())

        @hookimpl
        def after_train_iter(self, run):
            weights.append(run.model[3].weight.detach().clone())
            averages.append(ema.model_state_dict()["3.weight"].clone())

    tiny_run({"optimizer": Sgd(lr=0.1), "ema": ema, "watch": Watch()}, work_dir=tmp_path, until="4 iters")
    expected = weights[0]
    for step, weight in enumerate(weights[1:5], start=1):
        if step % 2 == 0:
            decay = 0.9 * (1 - math.exp(-step / 3))
            expected = decay * expected + (1 - decay) * weight
        torch.testing.assert_close(averages[step - 1], expected)


def test_a_frozen_model_is_not_trained_but_tested(tmp_path):
    @plugin
    class FreezeAll:
        """Freezes everything."""

        @hookimpl
        def prepare_model(self, run):
            run.model.requires_grad_(False)

    plugins = {"freeze": FreezeAll(), "optimizer": Sgd(lr=0.1), "ema": Ema(), "schedule": Cosine()}
    with pytest.raises(UserError, match="every parameter of the model is frozen"):
        tiny_run(plugins, work_dir=tmp_path)
    assert tiny_kernel(plugins, work_dir=tmp_path).test().mode == "test"


def test_the_summary_says_what_is_stepped(tmp_path):
    options = {"lr": 0.1, "base_batch_size": 4, "weight_decay": 0.5, "bias_weight_decay": 0}
    summary = tiny_kernel({"optimizer": Sgd(**options)}, work_dir=tmp_path).check()
    assert summary["optimizer"] == "SGD, lr 0.05 (0.1 for 4 images a step)"
    assert summary["parameter groups"] == "lr 0.05, decay 0.5: 3 tensors; lr 0.05, decay 0: 3 tensors"


class TestScaledRatesResume(HookContract):
    name = "optimizer"

    def plugin(self):
        return Adamw(lr=0.05, base_batch_size=3, layer_decay=LayerDecay(decay=0.5, layers=["0.0"]))


def test_the_model_is_one_whose_parameters_have_these_names(tmp_path):
    run = tiny_run({"model": TinyDetector()}, work_dir=tmp_path, until="1 iters")
    assert [name for name, _ in run.model.named_parameters()] == NAMES


def test_the_name_of_before_is_taken_with_a_warning(tmp_path, caplog):
    file = tmp_path / "config.yaml"
    file.write_text("run: {until: 1 iters}\noptimizer: {use: sgd, lr: 0.1, base_batch: 16}\n")
    loaded = load(str(file))
    assert loaded.plugins["optimizer"].base_batch_size == 16
    assert loaded.plain["optimizer"]["base_batch_size"] == 16
    assert "config.yaml:2:" in caplog.text
    assert "optimizer.base_batch: this option is called 'base_batch_size' now; rename it" in caplog.text
    with pytest.raises(ConfigError, match=r"optimizer.base_batch: .* 'base_batch_size' now, which is given as well"):
        load(str(file), ["optimizer.base_batch_size=8"])
