import pytest
import torch
from detkernel import ConfigError, UserError, hookimpl, option, plugin, state
from detkernel.testing import Recorder
from detkernel_detection.testing import HookContract, tiny_kernel, tiny_run
from detkernel_optim import restoring
from detkernel_optim.ema import Ema
from detkernel_optim.stepping import Adam, Adamw, Group, Sgd, TorchOptimizer


@plugin
class Keep:
    """Keeps the weights and gradients at every step."""

    weights: list = state(factory=list)
    gradients: list = state(factory=list)

    @hookimpl
    def before_optimizer_step(self, run):
        self.gradients.append([p.grad.clone() for p in run.model.parameters()])

    @hookimpl
    def after_train_iter(self, run):
        self.weights.append([p.detach().clone() for p in run.model.parameters()])


def weights(run):
    return [p.detach().clone() for p in run.bare_model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("ours", "make"),
    [
        (Sgd(lr=0.05, weight_decay=1e-3), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3)),
        (Sgd(lr=0.05, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
        (Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
        (Adamw(lr=0.01), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.01)),
        (
            TorchOptimizer(name="RAdam", lr=0.01, args={"eps": 1e-6}),
            lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.0, eps=1e-6),
        ),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "by_name"],
)
def test_steps_are_torchs(ours, make, tmp_path):
    @plugin
    class Plain:
        """The loop that one would write by hand."""

        @hookimpl
        def before_run(self, run):
            run.optimizer = make(run.model.parameters())

        @hookimpl(tryfirst=True)
        def after_train_iter(self, run, losses):
            run.optimizer.zero_grad()
            sum(losses.values()).backward()
            run.optimizer.step()

    torch.manual_seed(0)
    one = tiny_run({"optimizer": ours}, work_dir=tmp_path / "a", until="5 iters")
    torch.manual_seed(0)
    other = tiny_run({"optimizer": Plain()}, work_dir=tmp_path / "b", until="5 iters")
    assert same(weights(one), weights(other))


def test_groups_by_name_and_kind(tmp_path):
    sgd = Sgd(
        lr=0.1, weight_decay=0.01, norm_weight_decay=0, bias_weight_decay=0.002,
        groups=[Group(match="3.*", lr_mult=0.5, weight_decay_mult=2)],
    )  # fmt: skip
    run = tiny_run({"optimizer": sgd}, work_dir=tmp_path, until="1 iters")
    names = {id(p): name for name, p in run.model.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]}
    assert found == {
        "0.0.weight": (0.1, 0.01),
        "0.0.bias": (0.1, 0.002),
        "0.1.weight": (0.1, 0),
        "0.1.bias": (0.1, 0),
        "3.weight": (0.05, 0.02),
        "3.bias": (0.05, 0.004),
    }


def test_a_pattern_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no parameter's name matches 'backbone"):
        tiny_run({"optimizer": Sgd(lr=0.1, groups=[Group(match="backbone.*")])}, work_dir=tmp_path)


def test_accumulation_averages_gradients_and_steps_at_the_end(tmp_path):
    keep = Keep()
    tiny_run({"optimizer": Sgd(lr=0.1, accumulate=2), "keep": keep}, work_dir=tmp_path, until="5 iters")
    changed = [not same(a, b) for a, b in zip(keep.weights, keep.weights[1:], strict=False)]
    assert changed == [True, False, True, True]  # after iterations 2, 4, and 5: the last one
    assert len(keep.gradients) == 3


def test_clipping(tmp_path):
    recorder = Recorder()
    sgd = Sgd(lr=0.1, clip_norm=0.01, clip_value=0.004)

    @plugin
    class Look:
        """Looks at clipped gradients."""

        norms: list = state(factory=list)
        most: list = state(factory=list)

        @hookimpl
        def after_optimizer_step(self, run):
            gradients = [p.grad for p in run.model.parameters()]
            self.norms.append(torch.nn.utils.get_total_norm(gradients).item())
            self.most.append(max(g.abs().max().item() for g in gradients))

    look = Look()
    run = tiny_run({"optimizer": sgd, "look": look}, work_dir=tmp_path, recorder=recorder)
    assert max(look.norms) <= 0.0100001
    assert max(look.most) <= 0.004
    assert run.scalars["grad_norm"]() > 0.01
    assert recorder.names("optimizer_step") == ["before_optimizer_step", "after_optimizer_step"] * 4


def test_what_is_wrong_with_a_named_optimizer_is_said_before_data_is_read(tmp_path):
    for options, message in [
        ({"name": "Adamm"}, "torch.optim has no 'Adamm' that fits here, did you mean 'Adam'"),
        ({"name": "LBFGS"}, "torch.optim has no 'LBFGS' that fits here"),
        ({"name": "RAdam", "args": {"epps": 1}}, "RAdam has no argument 'epps', did you mean 'eps'"),
        ({"name": "RAdam", "args": {"weight_decay": 1}}, "give `weight_decay` as an option"),
    ]:
        recorder = Recorder()
        with pytest.raises(ConfigError, match=message):
            tiny_run({"optimizer": TorchOptimizer(lr=0.1, **options)}, work_dir=tmp_path, recorder=recorder)
        assert not recorder.of("build_loader")


def test_losses_without_one_to_minimise(tmp_path):
    @plugin
    class Odd:
        """A model whose only output is an accuracy."""

        @hookimpl
        def build_model(self):
            return torch.nn.Linear(1, 1)

        @hookimpl
        def train_step(self):
            return {"acc": torch.zeros(())}

    with pytest.raises(UserError, match="no name contains 'loss', so nothing is minimised"):
        tiny_run({"model": Odd(), "optimizer": Sgd(lr=0.1)}, work_dir=tmp_path)


def test_a_frozen_model(tmp_path):
    @plugin
    class Freeze:
        """Freezes everything."""

        @hookimpl
        def prepare_model(self, run):
            run.model.requires_grad_(False)

    with pytest.raises(UserError, match="nothing to train"):
        tiny_run({"freeze": Freeze(), "optimizer": Sgd(lr=0.1)}, work_dir=tmp_path)


def test_ema_follows_its_formula_and_is_swapped_in_for_validation(tmp_path):
    keep, seen = Keep(), []

    @plugin
    class Look:
        """Keeps the weights that a validation uses."""

        @hookimpl
        def before_val_iter(self, run):
            seen.append(weights(run))

    ema = Ema(decay=0.9, ramp=0)
    kernel = tiny_kernel(
        {"optimizer": Sgd(lr=0.1), "keep": keep, "ema": ema, "look": Look()},
        work_dir=tmp_path,
        validate="every 4 iters",
    )
    start = []

    @plugin
    class Start:
        """Keeps the first weights."""

        @hookimpl
        def before_train_epoch(self, run):
            start.append(weights(run))

    kernel.state.bus._manager.register(Start())
    run = kernel.run()
    expected = start[0]
    for step in keep.weights:
        expected = [0.9 * average + 0.1 * weight for average, weight in zip(expected, step, strict=True)]
    for one, other in zip(expected, seen[0], strict=True):
        torch.testing.assert_close(one, other)
    assert same(weights(run), keep.weights[-1])  # and swapped back
    averages = ema.model_state_dict()
    assert list(averages) == list(run.model.state_dict())
    assert torch.equal(averages["3.weight"], seen[0][4])


@plugin(priority="above_normal")
class Silent:
    """Steps, and says so to nobody."""

    @hookimpl
    def after_train_iter(self, run, losses):
        sum(losses.values()).backward()
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.sub_(0.01 * parameter.grad)


def test_ema_needs_one_who_says_when_a_step_is_taken(tmp_path):
    with pytest.raises(UserError, match="the weights were stepped, but no plugin fired after_optimizer_step"):
        tiny_run({"optimizer": Silent(), "ema": Ema()}, work_dir=tmp_path)


def test_ema_hears_any_stepping_plugin(tmp_path):
    ema = Ema()
    tiny_run({"ema": ema}, until="3 iters", work_dir=tmp_path)  # with the stepping of the testing kit
    assert ema.state_dict()["steps"] == 3


class TestSgdResumes(HookContract):
    name = "optimizer"

    def plugin(self):
        return Sgd(lr=0.05)


class TestAccumulationResumes(HookContract):
    name = "optimizer"

    def plugin(self):
        return Sgd(lr=0.05, accumulate=4)


@plugin
class HalfAdamw(Adamw):
    """Steps where the device says fp16."""

    @hookimpl
    def setup(self, run):
        run.precision = "fp16"


class TestHalfPrecisionResumes(HookContract):
    name = "optimizer"

    def plugin(self):
        return HalfAdamw(lr=0.01, accumulate=2, clip_norm=1)


def test_a_gradient_in_accumulation_comes_back_in_its_memory_format():
    """Or its norm, summed in another order, would differ in the last bit: found by a hundred kills, in a log line."""
    model = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    given = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    restoring.gradients(model, {"weight": given})
    assert model.weight.grad.stride() == given.stride()
    assert torch.equal(model.weight.grad, given)
    assert model.weight.grad.data_ptr() != given.data_ptr()


@plugin
class Projector:
    """A small network beside the model, trained with it."""

    saved: bool = option(default=True, help="whether a checkpoint has it")

    @hookimpl
    def prepare_model(self, run):
        torch.manual_seed(1)
        run.add_module(
            "projector",
            torch.nn.Sequential(torch.nn.Linear(7, 2), torch.nn.Linear(2, 1)),
            trained=True,
            saved=self.saved,
        )

    @hookimpl(wrapper=True)
    def train_step(self, run, model, batch):
        losses = yield
        out = run.modules["projector"](model(batch.images.float() / 255))
        return {**losses, "loss_projector": out.square().mean()}


class TestAModuleBesideTheModelResumes(HookContract):
    name = "projector"

    def plugin(self):
        return Projector()

    def kernel(self, plugins, **options):
        return super().kernel({"optimizer": Sgd(lr=0.05, accumulate=2), **plugins}, **options)


def test_a_module_beside_the_model_is_in_the_optimizer_by_its_name(tmp_path):
    optimizer = Sgd(lr=0.05, groups=[Group(match="projector.1.*", lr_mult=2)])
    plugins = {"optimizer": optimizer, "projector": Projector()}
    run = tiny_run(plugins, until="1 iters", work_dir=tmp_path)
    torch.manual_seed(1)
    before = torch.nn.Sequential(torch.nn.Linear(7, 2), torch.nn.Linear(2, 1))
    assert not torch.equal(before[0].weight, run.modules["projector"][0].weight)
    assert [(g["lr"], len(g["params"])) for g in run.optimizer.param_groups] == [(0.05, 8), (0.1, 2)]
    with pytest.raises(UserError, match="comes too late"):
        run.add_module("another", before, trained=False, saved=False)
