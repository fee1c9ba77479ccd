"""The `loader` plugin: data sets, transforms and workers become batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import attrs
from detkernel import Run, hookimpl, option, plugin, state, wrong
from detkernel.errors import did_you_mean
from detkernel.run import Mode
from detkernel_detection import Batch, BatchContext, BatchTransform, Dataset, Losses, Sampler, Transform
from detkernel_detection.findings import Finding

if TYPE_CHECKING:
    from detkernel_data.loading.batches import Batches
    from detkernel_data.loading.history import History

MODES = ("train", "val", "test", "predict")
_MOST_EXAMINED = 20_000
"""Images whose boxes are looked at when a run begins."""


@plugin(
    key="data",
    priority="very_high",
    provides=("boxes", "labels", "masks", "keypoints"),
    resume_neutral=(
        "workers",
        "prefetch",
        "pin_memory",
        "test",
        "predict",
        "val_batch_size",
    ),
)
class Loader:
    """Load images in worker processes, transform them, and make batches: the same with any number of workers.

    Masks and keypoints are loaded where an active plugin is made by `@plugin(needs=("masks",))`. A sample's random
    numbers follow from (seed, epoch, position) alone.
    """

    train: Dataset | None = option(default=None, help="what is trained on")
    val: Dataset | None = option(default=None, help="what is validated on during training")
    test: Dataset | None = option(default=None, help="what `detkernel test` evaluates; null: `val`")
    predict: Dataset | None = option(
        default=None,
        help="what a prediction is made for: images, such as an `image_folder`; annotations are not needed",
    )
    further_val: dict[str, Dataset] = option(
        factory=dict,
        help="validation sets beside `val`, by name, such as `night`: each is validated behind it, and tested behind "
        "`test`; the names of its metrics begin with its own, as in `night/coco/bbox_mAP`",
    )
    further: dict[str, Dataset] = option(
        factory=dict,
        help="data sets that a plugin trains with beside `train`, by the name of its loader, such as `unlabelled`; "
        "every image is taken, with or without objects, and `train_transforms` are for them as well",
    )
    batch_size: int = option(default=2, at_least=1, help="images a batch, on each process")
    val_batch_size: int | None = option(default=None, at_least=1, help="the same in validation; null: `batch_size`")
    train_transforms: list[Transform] = option(factory=list, help="what is done to a training image, in this order")
    val_transforms: list[Transform] = option(factory=list, help="the same in validation: transforms that only scale")
    batch_transforms: list[BatchTransform] = option(
        factory=list,
        help="what is done to a whole training batch once it is on its device, in this order, such as `multi_scale`",
    )
    workers: int | None = option(
        default=None,
        at_least=0,
        help="loading processes; 0: the main one loads; null: one a CPU core of this process's share",
    )
    prefetch: int = option(default=2, at_least=1, help="batches that each worker keeps ready")
    pin_memory: bool = option(default=True, help="page-locked batches for a GPU")
    shuffle: bool = option(default=True, help="another order of the training images in every epoch")
    group_by_aspect: bool = option(default=True, help="batches of landscape or of portrait images: less padding")
    sampler: Sampler | None = option(
        default=None,
        help="which training images an epoch takes, in which order, in the place of `shuffle` and `group_by_aspect`; "
        "null: each once",
    )
    batch_shapes: Literal["auto"] | list[tuple[int, int]] | None = option(
        default=None,
        at_least=1,
        help="[height, width] of batches, one or several, of which each batch gets the smallest that holds its images; "
        "auto: one for landscape and one for portrait images, from the transforms; null: as large as the largest image",
    )
    drop_last: bool = option(default=False, help="leave out a last training batch that is not full")
    skip_empty: bool = option(default=True, help="train only on images with an object to train on")
    missing_masks: Literal["drop", "box", "error"] = option(
        default="drop",
        help="objects without a mask, where the model is trained on masks: not trained on, the box is taken as the "
        "mask, or an error; all are counted",
    )

    _made: dict[str, Batches] = state(factory=dict)
    _history: History | None = state(default=None)

    @hookimpl
    def setup(self, run: Run) -> None:
        for name in self.further_val:
            taken = name in (*MODES, *self.further, *run.bus.loaders())
            if taken or not name.isidentifier():
                why = "a loader has this name already" if taken else "expected letters, digits and underscores"
                raise wrong(self, f"further_val.{name}", f"the name '{name}': {why}")
        if self.further_val and self.val is None:
            raise wrong(self, "further_val", "there is no `val`, which these are beside; name one of them `val`")
        run.val_sets = tuple(self.further_val)

    @hookimpl
    def build_loader(self, run: Run, mode: Mode) -> Any:
        from detkernel_data.loading.build import build_batches

        dataset = self._dataset(mode)
        if run.checking and mode == "test" and self.test is None:
            return None  # it is `val`, which has been looked at
        if dataset is None:
            if mode == "val" and run.options.validate:
                raise wrong(self, "val", "run.validate asks for a validation, but there is no data set for it")
            return None
        if mode == "train":
            self._check_further(run)
        if mode in ("train", "predict"):
            self._check_val_transforms()
        self._check_order()
        loader = build_batches(self, run, mode, dataset)
        if mode in self._made:
            self._made[mode].close()
        self._made[mode] = loader
        if mode == "train":
            self._history = loader.history
        return loader

    @hookimpl
    def before_train_iter(self, run: Run, batch: Batch) -> None:
        """Behind `device`, which has moved the batch, and before all who look at it."""
        for place, transform in enumerate(self.batch_transforms):
            if transform.is_active(run.epoch):
                transform(batch, self._context(run, place))

    def _context(self, run: Run, place: int) -> BatchContext:
        from detkernel_data.loading.batch_sampler import seed_of

        return BatchContext(
            epoch=run.epoch,
            iteration=run.iter,
            rank=run.rank,
            checking=run.checking,
            field_kinds=self._made["train"].dataset.fields,
            seed=partial(seed_of, run.seed, place),
        )

    @hookimpl
    def after_train_iter(self, batch: Batch, losses: Losses) -> None:
        if self._history is not None:
            self._history.hear(batch.indices, losses)

    @hookimpl(optionalhook=True)
    def before_save(self) -> None:
        if self._history is not None:
            self._history.gather()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._history is None else {"sampler": self._history.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if ("sampler" in state) != (self._history is not None):
            raise ValueError("it is of another sampler")
        if self._history is not None:
            self._history.load_state_dict(state["sampler"])

    @hookimpl
    def after_run(self) -> None:
        for loader in self._made.values():
            loader.close()

    @hookimpl
    def summary(self, run: Run) -> Mapping[str, str]:
        from detkernel_data.loading.summary import lines

        return lines(self._made, run.classes, trained=self.trains, decoded=run.check_data)

    def examine_data(self) -> Sequence[Finding]:
        """What `detkernel doctor` says of the data sets that are loaded, without opening an image: of files, only what
        it saw itself before. Of more than 20,000 images, what the readers say."""
        from detkernel_data.doctor.checks import SplitData, everything
        from detkernel_data.doctor.images import remembered

        known = {mode: batches.dataset for mode, batches in self._made.items()}
        if sum(map(len, known.values())) > _MOST_EXAMINED:
            notes = [(mode, one) for mode, dataset in known.items() for one in dataset.notes]
            return [attrs.evolve(Finding.of_note(one), split=mode) for mode, one in notes]
        splits = [SplitData.of(mode, dataset, self.transforms(mode)) for mode, dataset in known.items()]
        seen = {path: one for split in splits for path, one in remembered(split.paths).items()}
        return everything(splits, seen)

    def _dataset(self, mode: Mode) -> Dataset | None:
        if mode == "train":
            return self.train
        if mode == "predict":
            return self.predict
        if mode not in MODES:
            return {**self.further, **self.further_val}.get(mode)
        return self.val if mode == "val" or self.test is None else self.test

    def _check_further(self, run: Run) -> None:
        asked = run.bus.loaders()
        for name in self.further:
            if name not in asked:
                hint = did_you_mean(name, asked) or f"; asked for are {', '.join(asked) or 'none'}"
                raise wrong(self, f"further.{name}", f"no active plugin asks for a loader '{name}'{hint}")

    def _check_val_transforms(self) -> None:
        for number, transform in enumerate(self.val_transforms):
            if not transform.scales_only:
                message = (
                    f"{type(transform).__name__} (number {number}) moves objects, and detections could not be brought "
                    "back to the file's coordinates; validation takes transforms that only scale or change colours, "
                    "such as resize"
                )
                raise wrong(self, "val_transforms", message)

    def _check_order(self) -> None:
        from detkernel_data.transforms.standard import misplaced

        for name in ("train_transforms", "val_transforms"):
            problem = misplaced(getattr(self, name))
            if problem:
                raise wrong(self, name, problem)

    def trains(self, mode: Mode) -> bool:
        """Whether a mode's images are trained on."""
        return mode not in ("val", "test", "predict", *self.further_val)

    def transforms(self, mode: Mode) -> Sequence[Transform]:
        return self.train_transforms if self.trains(mode) else self.val_transforms
