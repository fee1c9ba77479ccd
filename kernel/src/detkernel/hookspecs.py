"""Every event, in the order in which it fires.

    setup(run)                             seeds, device, process group, sinks
    build_loader(run, mode) -> loader      from one plugin; mode: "train", "val",
                                           "test", a name of `loaders`
    build_model(run) -> model              first result, of one plugin alone
    prepare_model(run)                     move, compile, wrap for distribution
    before_run(run)                        (a resume is applied here, at the end)
    until done:
        before_train_epoch(run)
        for batch in the train loader:
            before_train_iter(run, batch)
            train_step(run, model, batch) -> losses    first result: forward only
                after_forward(run, batch, outputs) -> losses    if it is answered
            after_train_iter(run, batch, losses)    a stepping plugin goes back:
                after_backward(run)
                and when a step is due:
                before_optimizer_step(run)
                (clip the gradients; step, unless they are not finite)
                after_optimizer_step(run)      only when a step was taken
            when a validation is due:
                before_val_epoch(run)
                for `val`, and each further validation set:
                    before_val_set(run)        `run.val_set`, `run.loader`
                    for batch in its loader:
                        before_val_iter(run, batch)
                        val_step(run, model, batch) -> detections    first result
                        after_val_iter(run, batch, detections)
                    after_val_set(run)         evaluators publish metrics
                after_val_epoch(run)           all metrics are there
        after_train_epoch(run)
    summary(run) -> lines                  under `detkernel check` only
    after_run(run)
    on_error(run, error)                   on a failure; after_run still fires

Loaders come before the model, since the class count comes from the data. A resumed run fires exactly the events that
remain: when it starts inside an epoch, that epoch's `before_train_epoch` is not fired a second time. `detkernel test`
fires the validation's events with `run.mode == "test"`, so that an evaluator is written once. In a prediction
(`Kernel.predict`, `run.mode == "predict"`) the events up to `before_run` fire, then `val_step` for every batch of the
loader for "predict", and nothing of a validation.

An implementation names only the arguments it wants, as in the example that ends each event's description. Order:
`priority`, then the order in the config. `@hookimpl` takes pluggy's options: `wrapper=True` brackets the others,
`tryfirst` and `trylast` go before and behind every priority. At `on_error` and `after_run`, every plugin is called for
itself, so that none can keep another from its turn: there, a wrapper brackets nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from detkernel.plugin import hookspec

if TYPE_CHECKING:
    from detkernel.run import Loader, Mode, Run

Batch: TypeAlias = Any
"""What a loader gives; the plugins of a run agree on it (those of detection on `detkernel_detection.Batch`)."""
Losses: TypeAlias = Mapping[str, Any]
"""Named scalars. The sum of every entry whose name contains "loss" is minimised; the others are only logged."""
Detections: TypeAlias = Any
"""What a model finds in one item of a batch."""


class Events:
    """The kernel's events. The bus is cast to this class, so that mypy checks every call."""

    @hookspec
    def setup(self, run: Run) -> None:
        """First of all: seeds, device, log sinks, reading data sets. No model, no loader yet.

        For example:

            @hookimpl
            def setup(self, run):
                run.log.info("seed %d, results in %s", run.seed, run.work_dir)
        """

    @hookspec(firstresult=True)
    def build_loader(self, run: Run, mode: Mode) -> Loader | None:
        """Make the loader of a mode, or return None if it is not yours to make.

        Called for "train" and, where a validation is asked for, "val"; `detkernel test` asks for "test", a prediction
        for "predict", whose data has no annotations. A plugin
        made by `@plugin(loaders=("unlabelled",))` has that one made for training as well, and takes its batches by
        `run.next_batch("unlabelled")`. Two plugins that both make the loader of a mode are an error.

        For example:

            @hookimpl
            def build_loader(self, run, mode):
                return MyLoader(mode, seed=run.seed)
        """

    @hookspec(firstresult=True)
    def build_model(self, run: Run) -> Any:
        """Make the model for `run.classes`. Exactly one active plugin may implement this.

        For example:

            @hookimpl
            def build_model(self, run):
                return MyDetector(num_classes=len(run.classes))
        """

    @hookspec
    def prepare_model(self, run: Run) -> None:
        """`run.model` is there: load weights, move it, convert its norms, compile it, wrap it. The last place for
        `run.add_module`, which keeps a network beside the model.

        For example:

            @hookimpl
            def prepare_model(self, run):
                for name, parameter in run.model.named_parameters():
                    parameter.requires_grad = not name.startswith("backbone.")
        """

    @hookspec
    def before_run(self, run: Run) -> None:
        """Everything is built, nothing has run. Make optimizers and other state here; a resume, applied by the
        checkpoint plugin behind all others (`trylast`), overwrites that state.

        For example:

            @hookimpl
            def before_run(self, run):
                run.scalars["progress"] = lambda: run.iter / run.max_iters
        """

    @hookspec
    def before_train_epoch(self, run: Run) -> None:
        """An epoch begins; `run.epoch` counts those complete. Not fired again when a resume starts inside it.

        For example:

            @hookimpl
            def before_train_epoch(self, run):
                run.log.info("epoch %d of %d", run.epoch + 1, run.max_epochs)
        """

    @hookspec
    def before_train_iter(self, run: Run, batch: Batch) -> None:
        """A batch has arrived; it may be changed in place (`device` moves it here, before all others).

        For example:

            @hookimpl
            def before_train_iter(self, run, batch):
                run.log.debug("%s", batch)
        """

    @hookspec(firstresult=True)
    def train_step(self, run: Run, model: Any, batch: Batch) -> Losses:
        """Forward only: return named losses, each a number that can be differentiated. The first that is not None wins.

        For example:

            @hookimpl(wrapper=True)
            def train_step(self, run, batch):
                losses = yield  # the model's own
                return {**losses, "loss_bbox": losses["loss_bbox"] / 2}
        """
        return {}

    @hookspec
    def after_train_iter(self, run: Run, batch: Batch, losses: Losses) -> None:
        """The iteration is counted in `run.iter`. Stepping plugins go backward and step here (`above_normal`), and fire
        the events of the optimizer; at `normal` the step is done.

        For example:

            @hookimpl
            def after_train_iter(self, run, losses):
                if run.iter == 1:
                    run.log.info("the losses are %s", ", ".join(losses))
        """

    @hookspec
    def after_forward(self, run: Run, batch: Batch, outputs: Any) -> Losses | None:
        """The network has spoken, and the losses are not made of it yet. What is returned is added to the losses.

        A model plugin fires it for `run.model` in training. Where nobody answers it, a step is one graph; where
        somebody does, it is taken in two parts, which `compile` compiles each for itself.

        For example:

            @hookimpl
            def after_forward(self, outputs):
                return {"loss_logits": 0.01 * outputs["logits"].abs().mean()}
        """
        return None

    @hookspec
    def after_backward(self, run: Run) -> None:
        """A backward pass is done. The gradients are the sum over the iterations since the last step, multiplied by
        the loss scale under fp16; `before_optimizer_step` has them as the step is taken with.

        For example:

            @hookimpl
            def after_backward(self, run):
                grads = [parameter.grad for _, parameter in run.bare_model.named_parameters()]
                run.log.debug("%d parameters have a gradient", sum(grad is not None for grad in grads))
        """

    @hookspec
    def before_optimizer_step(self, run: Run) -> None:
        """Gradients are complete, averaged over processes and iterations, unscaled, and not clipped yet.

        Every stepping plugin fires it, and `after_optimizer_step`: `run.hook.before_optimizer_step(run=run)`.

        For example:

            @hookimpl
            def before_optimizer_step(self, run):
                for name, parameter in run.bare_model.named_parameters():
                    if name.startswith("backbone."):
                        parameter.grad *= 0.1
        """

    @hookspec
    def after_optimizer_step(self, run: Run) -> None:
        """The weights have been stepped; the gradients are still there. Not fired for a step that was left out, as one
        with invalid gradients is.

        For example:

            @hookimpl
            def after_optimizer_step(self, run):
                run.log.debug("stepped in iteration %d", run.iter)
        """

    @hookspec
    def before_val_epoch(self, run: Run) -> None:
        """A validation begins, of one set of data or several.

        For example:

            @hookimpl
            def before_val_epoch(self, run):
                run.log.info("validating behind %d iterations", run.iter)
        """

    @hookspec
    def before_val_set(self, run: Run) -> None:
        """One of the sets of a validation begins: `run.val_set` is its name, empty for `val` (and `test`), and
        `run.loader` its loader. Where no plugin names further sets (`run.val_sets`), there is one a validation.

        For example:

            @hookimpl
            def before_val_set(self):
                self._found = 0
        """

    @hookspec
    def before_val_iter(self, run: Run, batch: Batch) -> None:
        """A batch for validation has arrived.

        For example:

            @hookimpl
            def before_val_iter(self, run, batch):
                run.log.debug("sizes %s", batch.sizes)
        """

    @hookspec(firstresult=True)
    def val_step(self, run: Run, model: Any, batch: Batch) -> Sequence[Detections]:
        """Predict: one entry for each sample of the batch, in the units of the data. Runs without gradients.

        For example:

            @hookimpl
            def val_step(self, model, batch):
                return model.predict(batch)
        """
        return []

    @hookspec
    def after_val_iter(self, run: Run, batch: Batch, detections: Sequence[Detections]) -> None:
        """A batch was detected; evaluators collect here.

        For example:

            @hookimpl
            def after_val_iter(self, detections):
                self._found += sum(map(len, detections))
        """

    @hookspec
    def after_val_set(self, run: Run) -> None:
        """One of the sets of a validation is complete; evaluators publish their metrics here. What is published for a
        further set is named by it: `night/mine/found`.

        For example:

            @hookimpl
            def after_val_set(self, run):
                run.metrics.publish("mine/found", self._found, better="higher")
        """

    @hookspec
    def after_val_epoch(self, run: Run) -> None:
        """A validation is complete, of all its sets; `run.metrics` has what the evaluators found.

        For example:

            @hookimpl
            def after_val_epoch(self, run):
                if run.metrics["mine/found"] == 0:
                    run.log.warning("nothing was detected")
        """

    @hookspec
    def after_train_epoch(self, run: Run) -> None:
        """A whole epoch is complete and counted in `run.epoch`. Not fired for an epoch that the run ends inside.

        For example:

            @hookimpl
            def after_train_epoch(self, run):
                if run.metrics.get("mine/found") == 0:
                    run.stop("nothing is detected any more")
        """

    @hookspec
    def after_run(self, run: Run) -> None:
        """The run ends, well or not (`run.error`). Fires for every plugin, even when one of them fails here.

        For example:

            @hookimpl
            def after_run(self, run):
                run.log.info("%d iterations, %s", run.iter, "failed" if run.error else "complete")
        """

    @hookspec
    def on_error(self, run: Run, error: BaseException) -> None:
        """The run failed with `error`, which is raised again once `after_run` has fired.

        For example:

            @hookimpl
            def on_error(self, run, error):
                run.log.error("failed in iteration %d: %s", run.iter, error)
        """

    @hookspec
    def summary(self, run: Run) -> list[Mapping[str, str]]:
        """Lines for `detkernel check`, after two batches went forward and backward: what the run is and will cost. Each
        plugin returns one map, such as {"parameters": "32.1 M, 31.9 M trainable"}; the kernel joins them.

        For example:

            @hookimpl
            def summary(self, run):
                count = sum(parameter.numel() for _, parameter in run.model.named_parameters())
                return {"parameters": f"{count / 1e6:.1f} M"}
        """
        return []
