"""States that come back: what goes on from them, and what is said of those that do not fit."""

import pytest
import torch
from detkernel import UserError, hookimpl, option, plugin, state
from detkernel_detection.testing import tiny_run
from detkernel_optim.plateau import Plateau
from detkernel_optim.stepping import Adam, Sgd


@plugin
class Falling:
    """Publishes a metric that gets worse with every validation."""

    start: float = option(default=1.0, help="the first one")
    rates: list = state(factory=list)

    @hookimpl(trylast=True)
    def before_train_iter(self, run):
        self.rates.append(run.optimizer.param_groups[0]["lr"])

    @hookimpl
    def after_val_epoch(self, run):
        run.metrics.publish("score", self.start - run.iter, better="higher")


@plugin
class Restored:
    """Gives another plugin a state, as a resume does."""

    values: dict = option(help="the state")
    to: object = state()

    @hookimpl(trylast=True)
    def before_run(self):
        self.to.load_state_dict(self.values)


def test_a_plateau_that_has_fallen_goes_on_from_there(tmp_path):
    """Cut behind the second fall, within the cooldown: the third falls where it does in the run as a whole."""

    def run(iterations, start, saved=None):
        schedule, falling = Plateau(metric="score", patience=1, gamma=0.5, cooldown=1), Falling(start=start)
        plugins = {"optimizer": Sgd(lr=1.0), "schedule": schedule, "falling": falling}
        if saved is not None:
            plugins["restored"] = Restored(values=saved)
            plugins["restored"].to = schedule
        tiny_run(plugins, until=f"{iterations} iters", validate="1 iter", work_dir=tmp_path)
        return falling.rates, schedule

    whole, _ = run(12, 0.0)
    falls = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]  # the best and two that are worse; one of cooldown and two; ...
    assert whole == [0.5**fall for fall in falls]
    _, fallen = run(6, 0.0)
    saved = fallen.state_dict()
    second, _ = run(6, -6.0, saved)
    assert second == whole[6:]
    with pytest.raises(ValueError, match=r"its factor is 1\.5"):
        fallen.load_state_dict({**saved, "level": 1.5})


class Unable(torch.optim.SGD):
    """Cannot step."""

    def step(self, closure=None):
        raise RuntimeError("no power")


@plugin
class Steps(Sgd):
    """Makes it."""

    def _make(self, groups):
        return Unable(groups)


def test_a_step_that_fails_is_put_down_to_the_checkpoint_behind_a_resume_only(tmp_path):
    with pytest.raises(RuntimeError, match=r"^no power"):
        tiny_run({"optimizer": Steps(lr=0.1)}, until="1 iter", work_dir=tmp_path)
    optimizer = Steps(lr=0.1)
    resumed = Restored(values=state_of(tmp_path))
    resumed.to = optimizer
    with pytest.raises(UserError, match=r"could not step with its state from the checkpoint: RuntimeError: no power"):
        tiny_run({"optimizer": optimizer, "resumed": resumed}, until="1 iter", work_dir=tmp_path)


def state_of(tmp_path):
    """Of an optimizer that has stepped."""
    optimizer = Sgd(lr=0.1)
    tiny_run({"optimizer": optimizer}, until="1 iter", work_dir=tmp_path)
    return {**optimizer.state_dict(), "kind": "Unable"}


def test_lists_of_a_state_must_be_as_long_as_the_optimizers(tmp_path):
    """Such as Adam's two betas."""
    optimizer = Adam(lr=0.1)
    tiny_run({"optimizer": optimizer}, until="1 iter", work_dir=tmp_path)
    for betas in ((0.9,), (0.9, 0.99, 0.999), 0.9, ("x", 0.9), (True, 0.9)):
        saved = optimizer.state_dict()
        saved["optimizer"]["param_groups"][0]["betas"] = betas
        with pytest.raises(ValueError, match="its 'betas' is"):
            optimizer.load_state_dict(saved)
