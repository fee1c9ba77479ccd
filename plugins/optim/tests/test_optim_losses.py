"""What is minimised of what a `train_step` gives."""

import pytest
import torch
from detkernel import UserError, hookimpl, option, plugin, state
from detkernel_detection.testing import TinyDetector, tiny_run
from detkernel_optim.stepping import Sgd


@plugin
class More:
    """Adds an entry to the losses."""

    name: str = option(default="loss", help="its name")
    what: str = option(default="sum", help="what it is")

    @hookimpl(wrapper=True)
    def train_step(self):
        losses = yield
        made = {
            "sum": lambda: sum(losses.values()),
            "number": lambda: 3,
            "vector": lambda: torch.stack([losses["loss_cls"]] * 3),
            "one": lambda: losses["loss_cls"].reshape(1),
            "text": lambda: "three",
            "half": lambda: 0.5 * losses["loss_cls"],
        }[self.what]()
        return {**losses, self.name: made}


@plugin
class Third:
    """A third loss, always zero."""

    @hookimpl(wrapper=True)
    def train_step(self):
        losses = yield
        return {**losses, "loss_none": 0 * losses["loss_cls"], "loss_more": 0.3 * losses["loss_cls"]}


@plugin(priority="very_high")
class Gradient:
    """Compares the gradient of a step with that of the parts."""

    wanted: object = state(default=None)
    ratios: list = state(factory=list)
    names: list = state(factory=list)

    @hookimpl
    def after_train_iter(self, run, losses):
        parts = losses["loss_cls"] + losses["loss_bbox"] + losses.get("loss_more", 0)
        self.wanted = torch.autograd.grad(parts, list(run.model.parameters()), retain_graph=True)
        self.names.append(list(losses))

    @hookimpl
    def before_optimizer_step(self, run):
        got = torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()])
        self.ratios.append(float(got / torch.nn.utils.get_total_norm(self.wanted)))


def run_with(tmp_path, **plugins):
    gradient = Gradient()
    base = {"optimizer": Sgd(lr=0.01), "model": TinyDetector(dropout=0), "gradient": gradient}
    tiny_run({**base, **plugins}, until="2 iters", work_dir=tmp_path)
    return gradient


@pytest.mark.parametrize("name", ["loss", "total_loss", "loss_total", "Total_loss"])
def test_the_total_beside_its_parts_does_not_count_twice(name, tmp_path, caplog):
    gradient = run_with(tmp_path, more=More(name=name))
    assert gradient.ratios == pytest.approx([1, 1], rel=1e-4)
    assert name not in gradient.names[0]  # nor does the log add it up again
    assert caplog.text.count(f"train_step gave '{name}', the sum of the other losses: it is left out") == 1


def test_the_total_under_any_name_is_found(tmp_path):
    gradient = run_with(tmp_path, more=More(name="loss_everything"), third=Third())
    assert gradient.ratios == pytest.approx([1, 1], rel=1e-4)


def test_a_loss_called_loss_that_is_no_sum_counts(tmp_path):
    gradient = run_with(tmp_path, more=More(name="loss", what="half"))
    assert "loss" in gradient.names[0]
    assert gradient.ratios[0] > 1.1


def test_a_number_is_logged_and_not_minimised(tmp_path):
    gradient = run_with(tmp_path, more=More(name="objects", what="number"), one=More(name="accuracy", what="one"))
    assert gradient.ratios == pytest.approx([1, 1], rel=1e-4)
    assert {"objects", "accuracy"} < set(gradient.names[0])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("vector", r"train_step gave 'loss_each' of shape \[3\]: expected one number; average it"),
        ("text", "train_step gave 'loss_each', a str: expected a scalar tensor or a number"),
    ],
)
def test_what_has_no_one_value_is_said(what, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run_with(tmp_path, more=More(name="loss_each", what=what))


def test_losses_of_which_no_trained_parameter_takes_part(tmp_path):
    @plugin
    class Freeze:
        """Freezes everything once the run has begun."""

        @hookimpl
        def before_train_iter(self, run):
            run.model.requires_grad_(False)

    with pytest.raises(UserError, match="iteration 1: no trained parameter takes part in the loss: all are frozen"):
        tiny_run({"optimizer": Sgd(lr=0.1), "freeze": Freeze()}, work_dir=tmp_path)
