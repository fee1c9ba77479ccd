"""Finds a model whose class count is not that of the data."""

from __future__ import annotations

from detkernel import Run, UserError, hookimpl, option, plugin
from detkernel_detection import Batch


@plugin(resume_neutral=("*",))
class CheckClasses:
    """Check that the model has as many classes as the data, and that every label is one of them.

    Without it, a label too high is an assertion inside of a GPU kernel, which names nothing.
    """

    interval: int = option(default=200, at_least=1, help="iterations between checks of labels")

    @hookimpl
    def before_run(self, run: Run) -> None:
        count = len(run.classes)
        for name, module in run.bare_model.named_modules():
            found = getattr(module, "num_classes", None)
            if isinstance(found, int) and found not in (count, count + 1):
                raise UserError(
                    f"the model's {name or type(module).__name__} has {found} classes, but the data has {count} "
                    f"({', '.join(run.classes)}): take the count from run.classes (and one for a background)"
                )

    @hookimpl
    def before_train_iter(self, run: Run, batch: Batch) -> None:
        if run.iter % self.interval:
            return
        count = len(run.classes)
        for image_id, target in zip(batch.image_ids, batch.each_target(), strict=True):
            if len(target) and not 0 <= int(target.labels.min()) <= int(target.labels.max()) < count:
                labels = sorted(set(target.labels.tolist()))
                raise UserError(
                    f"image {image_id}: labels {labels}, but the data has {count} classes, counted from 0; a "
                    "data set or transform changes labels"
                )
