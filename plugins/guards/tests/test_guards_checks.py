"""What the checks of losses and classes let pass, and how they count."""

import pytest
import torch
from detkernel import UserError, hookimpl, option, plugin, state
from detkernel_detection.testing import tiny_run
from detkernel_guards.check_classes import CheckClasses
from detkernel_guards.check_invalid_loss import CheckInvalidLoss
from detkernel_guards.early_stopping import EarlyStopping


@plugin
class Losses:
    """Gives these losses beside the model's or in the place of them, in one iteration."""

    at: int = option(default=2, help="which")
    extra: dict = option(factory=dict, help="beside")
    only: dict | None = option(default=None, help="in the place")

    @hookimpl(wrapper=True)
    def train_step(self, run):
        losses = yield
        if run.iter + 1 != self.at:
            return losses
        return {**losses, **self.extra} if self.only is None else self.only


@plugin
class NoStep:
    """Takes the place of the optimizer."""


@plugin
class Skips:
    """Says, as an optimizer does, that it leaves invalid steps out."""

    @hookimpl
    def before_run(self, run):
        run.scalars["skipped_steps"] = lambda: 0.0


NAN = {"loss_more": torch.tensor(float("nan"))}


def test_where_invalid_steps_are_left_out_an_invalid_loss_stops_nothing(tmp_path):
    plugins = {"losses": Losses(extra=NAN), "check": CheckInvalidLoss(interval=1), "optimizer": NoStep()}
    with pytest.raises(UserError, match="iteration 2: loss_more is nan"):
        tiny_run(plugins, until="4 iters", work_dir=tmp_path)
    assert tiny_run({**plugins, "skips": Skips()}, until="4 iters", work_dir=tmp_path).iter == 4


def test_an_iteration_without_a_loss_is_passed_over(tmp_path):
    plugins = {"losses": Losses(only={"acc": torch.tensor(float("nan"))}), "check": CheckInvalidLoss(interval=1)}
    assert tiny_run({**plugins, "optimizer": NoStep()}, until="4 iters", work_dir=tmp_path).iter == 4


@plugin
class Asks:
    """Has the losses looked at behind the step of an iteration, as a save, a line of the log or a stop does."""

    what: str = option(help="by which")
    check: object = state()

    @hookimpl
    def after_train_iter(self, run):
        if run.iter == 3:
            if self.what == "stop":
                run.stop("enough")
            else:
                getattr(self.check, self.what)(run)


@pytest.mark.parametrize("what", ["before_save", "after_log_line", "stop"])
@pytest.mark.parametrize(("at", "since"), [(3, "1 iteration went on"), (2, "2 iterations went on")])
def test_the_step_of_the_iteration_itself_counts_where_it_has_been_taken(what, at, since, tmp_path):
    asks, check = Asks(what=what), CheckInvalidLoss(interval=1000)
    asks.check = check
    plugins = {"losses": Losses(at=at, extra=NAN), "check": check, "optimizer": NoStep(), "asks": asks}
    with pytest.raises(UserError, match=rf"iteration {at}: loss_more is nan .*\. {since} with it"):
        tiny_run(plugins, until="9 iters", work_dir=tmp_path)


@pytest.mark.parametrize(("count", "fits"), [(2, False), (3, True), (4, True), (5, False)])
def test_a_model_has_the_classes_of_the_data_and_perhaps_a_background(count, fits, tmp_path):
    @plugin
    class Claims:
        """Says how many classes its head has."""

        @hookimpl
        def prepare_model(self, run):
            run.model[3].num_classes = count

    plugins = {"claims": Claims(), "check": CheckClasses()}
    if fits:
        assert tiny_run(plugins, until="1 iter", work_dir=tmp_path).iter == 1
    else:
        with pytest.raises(UserError, match=rf"has {count} classes, but the data has 3"):
            tiny_run(plugins, work_dir=tmp_path)


@pytest.mark.parametrize(("label", "fits"), [(-1, False), (0, True), (2, True), (3, False)])
def test_labels_count_from_0_to_the_last_class(label, fits, tmp_path):
    @plugin(priority="high")
    class Sets:
        """Sets every label."""

        @hookimpl
        def before_train_iter(self, batch):
            batch.targets.labels[batch.targets.valid] = label

    plugins = {"sets": Sets(), "check": CheckClasses(interval=1), "optimizer": NoStep()}
    if fits:
        assert tiny_run(plugins, until="1 iter", work_dir=tmp_path).iter == 1
    else:
        with pytest.raises(UserError, match=rf"labels \[{label}\], but the data has 3 classes"):
            tiny_run(plugins, work_dir=tmp_path)


@plugin
class Worse:
    """Publishes a metric that gets worse with every validation."""

    @hookimpl
    def after_val_epoch(self, run):
        run.metrics.publish("score", -float(run.iter), better="higher")


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_ends_with_the_last_validation_that_it_waits_for(patience, tmp_path):
    plugins = {"worse": Worse(), "stop": EarlyStopping(metric="score", patience=patience)}
    run = tiny_run(plugins, until="9 iters", validate="1 iter", work_dir=tmp_path)
    assert run.iter == 1 + patience
    assert run.stop_reason == f"score has not improved for {patience} validations (best: -1.0000)"
