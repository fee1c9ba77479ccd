"""The base of model plugins: it answers `build_model`, `train_step` and `val_step` once, for every `Detector`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from detkernel import DataError, Run, UserError, declared, hookimpl, plugin

if TYPE_CHECKING:
    from detkernel_detection.detector import Detector
    from detkernel_detection.structures import Batch, Detections, Losses


@plugin(key="model", needs=())
class DetectorPlugin:
    """A detector, built for the classes of the data. A subclass writes `build`."""

    uses_fields: ClassVar[tuple[str, ...]] = ()
    """The fields of objects that its losses go by where there are any, such as "weight"."""

    @property
    def loads_weights(self) -> bool | None:
        """Whether its options make `load` load weights of the whole model; None: nobody can know."""
        return None

    def build(self, run: Run) -> Detector:
        """Make the model for `run.classes`, with random weights; generators are seeded."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is built")

    def load(self, run: Run, model: Detector) -> None:
        """Load the weights that the options ask for."""

    def check_sizes(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Raise `ConfigError` for images, of (height, width), that the model cannot take."""

    def arguments(self, batch: Batch) -> dict[str, Any]:
        """What the model is given beside images, targets and sizes."""
        return {}

    @hookimpl
    def build_model(self, run: Run) -> Detector:
        import torch

        from detkernel_detection.weights import are_replaced

        torch.manual_seed(run.seed)
        model = self.build(run)
        self._check_parts(run, model)
        if not are_replaced():
            self.load(run, model)
        return model

    @hookimpl
    def train_step(self, run: Run, model: Any, batch: Batch) -> Losses:
        self._check(batch)
        arguments = self.arguments(batch)
        if model is run.model and run.bus.is_answered("after_forward"):
            arguments["after_forward"] = partial(_further_losses, run, batch)
        # One call of the model, also where it is taken in parts: a wrapper for several processes must see it.
        losses: Losses = model(batch.images, batch.targets, batch.image_sizes, **arguments)
        return losses

    @hookimpl
    def val_step(self, run: Run, model: Any, batch: Batch) -> Sequence[Detections]:
        from detkernel_detection.predictions import detect

        self.check_sizes(batch.sizes)
        return detect(model, batch, run.bare_model, **self.arguments(batch))

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        parameters = list(run.bare_model.parameters())
        count, trained = (sum(p.numel() for p in parameters if p.requires_grad or whole) for whole in (True, False))
        return {"model": f"{type(self).__name__}, {count / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained"}

    def _check_parts(self, run: Run, model: Detector) -> None:
        names = [impl.name for impl in run.bus.implementations("after_forward")]
        if names and not model.has_parts:
            raise UserError(
                f"plugin '{names[0]}' answers after_forward, but {type(self).__name__} computes losses in one piece "
                "with its outputs, so that nothing can come between; use a detector that has `forward_outputs` and "
                f"`losses`, or remove the plugin with `{names[0]}: null`"
            )

    def _check(self, batch: Batch) -> None:
        self.check_sizes(batch.sizes)
        for name in declared(self).needs:
            if getattr(batch.targets, name) is None:
                raise DataError(f"the model is trained on {name}, but the training data has none; use data with {name}")


def _further_losses(run: Run, batch: Batch, outputs: Any) -> Losses:
    """What the plugins that answer `after_forward` add to the losses. Raises `UserError` for a name that is taken."""
    found: dict[str, Any] = {}
    answers: Any = run.hook.after_forward(run=run, batch=batch, outputs=outputs)
    for losses in answers:
        taken = sorted(found.keys() & losses.keys())
        if taken:
            raise UserError(f"two plugins add the loss '{taken[0]}' after_forward; let one of them name it otherwise")
        found |= losses
    return found
