"""From the loader's options to one of its loaders."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
from detkernel import DataError, Run, declared, wrong
from detkernel.errors import as_typed, did_you_mean, printable, relative
from detkernel.run import Mode
from detkernel.span import Span
from detkernel_detection import Annotations, BatchTransform, Dataset, Transform
from detkernel_detection.findings import Finding
from torch import Tensor

from detkernel_data.cleaning.clean import validate
from detkernel_data.doctor.told import READERS, Told, lines
from detkernel_data.formats.overview import Overview, maskless, overview
from detkernel_data.loading.batch_sampler import BatchSampler, Extremes
from detkernel_data.loading.batch_shapes import Size, choose_shapes
from detkernel_data.loading.batches import Batches
from detkernel_data.loading.history import History
from detkernel_data.loading.samples import Samples
from detkernel_data.loading.workers import worker_count
from detkernel_data.masks import MISSING, trainable, without_mask
from detkernel_data.report import note, write_places

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from detkernel_data.loading.loader import Loader


def build_batches(options: Loader, run: Run, mode: Mode, dataset: Dataset) -> Batches:
    """Load the data set, choose its images, and make the loader of a mode."""
    if not dataset.classes:
        dataset.load()
    _tell(run, mode, dataset, dataset.notes)
    validate(dataset, mode)
    if run.check_data:
        from detkernel_data.loading.check_images import check_images

        check_images(dataset, mode, worker_count(options.workers))
    if run.loaders:
        dataset = matched(dataset, run.classes, mode)
    training = options.trains(mode)
    for step in options.batch_transforms if mode == "train" else ():
        _check_fields(options, "batch_transforms", step, dataset.fields)
        step.prepare(dataset)
    transforms_option = "train_transforms" if training else "val_transforms"
    added = _added_fields(options, run, dataset) if training else {}
    for transform in options.transforms(mode):
        _check_fields(options, transforms_option, transform, {**dict.fromkeys(added, "value"), **dataset.fields})
        transform.prepare(dataset)
    needs = {need for plugin in run.bus.plugins.values() for need in declared(plugin).needs}
    trained_masks = training and "masks" in needs
    masks = trained_masks or (training and any("masks" in declared(each).needs for each in options.transforms(mode)))
    shapes = choose_shapes(options, options.transforms(mode), dataset)
    samples = Samples(
        dataset, options.transforms(mode), run.seed, masks=masks, keypoints=training and "keypoints" in needs,
        seeded=training, missing_masks=options.missing_masks, shapes=shapes,
        masks_kept=trained_masks, added_fields=added,
    )  # fmt: skip
    groups = _groups(options, run, mode, dataset, trained_masks, shapes)
    sampler = options.sampler if mode == "train" else None
    history = None
    if sampler is not None:
        sampler.prepare(dataset, groups[0].tolist())
        history = History(sampler, run, groups[0].tolist()) if History.is_needed(sampler) else None
    batch_sampler = BatchSampler(
        groups,
        options.batch_size if training else options.val_batch_size or options.batch_size,
        run.seed,
        training=training,
        shuffle=options.shuffle,
        drop_last=training and options.drop_last,
        rank=run.rank,
        world_size=run.world_size,
        sampler=history or sampler,
    )
    samples.indices = np.concatenate(batch_sampler.groups)  # type: ignore[assignment]
    samples.epochs = _epochs(run.options.until, len(batch_sampler)) if training else None
    if len(batch_sampler) == 0 and (training or run.world_size == 1):
        raise DataError(f"{mode} data: {len(dataset)} images make no batch of {batch_sampler.batch_size}")
    return Batches(
        samples,
        Extremes(batch_sampler, dataset) if run.checking else batch_sampler,
        training=training,
        history=history,
        batch_transforms=options.batch_transforms if mode == "train" else (),
        workers=worker_count(options.workers),
        prefetch=options.prefetch,
        pin_memory=options.pin_memory and getattr(run.device, "type", "cpu") == "cuda",
        stopping=lambda: run.stop_reason is not None,
    )


def _epochs(until: Span, epoch_length: int) -> int | None:
    """How many epochs a run has, the last perhaps not whole."""
    return -(-until.iters(epoch_length) // epoch_length) if epoch_length else None


def _added_fields(options: Loader, run: Run, dataset: Dataset) -> dict[str, float]:
    """The fields that training transforms change, with the values that they begin with. Raises `ConfigError` for one
    that no plugin goes by, or that the data set has for another purpose."""
    used = {name for plugin in run.bus.plugins.values() for name in getattr(type(plugin), "uses_fields", ())}
    found: dict[str, float] = {}
    for transform in options.train_transforms:
        for name, value in transform.adds_fields().items():
            kind = dataset.fields.get(name, "value")
            if name in used and kind == "value":
                found[name] = value
                continue
            message = f"{type(transform).__name__} changes the field '{name}' of the objects, "
            if kind != "value":
                message += f"which is of kind '{kind}' in the data; expected 'value'"
            else:
                message += "but no active plugin says that it uses it (`uses_fields`); leave that option at its default"
            raise wrong(options, "train_transforms", message)
    return found


def _check_fields(
    options: Loader, where: str, transform: Transform | BatchTransform, fields: Mapping[str, str]
) -> None:
    """Raise `ConfigError` for a field of the objects that a transform would leave behind, or a need that is not met."""
    provided = declared(options).provides
    for need in declared(transform).needs:
        if need not in provided:
            message = f"{type(transform).__name__} needs '{need}'{did_you_mean(need, provided)}"
            raise wrong(options, where, message)
    for name, kind in fields.items():
        if kind not in transform.moves_fields and "any" not in transform.moves_fields:
            message = (
                f"{type(transform).__name__} cannot move the field '{name}' of kind '{kind}' (it moves "
                f"{', '.join(transform.moves_fields) or 'none'}); leave out the transform or the field"
            )
            raise wrong(options, where, message)


def _tell(run: Run, mode: Mode, dataset: Dataset, notes: Sequence[str], part: str = READERS) -> None:
    """In a check, log them; in a run, those that neither the last run nor `detkernel doctor` said. Where there are more
    places than a note names, all are written to a file in the work dir."""
    if not run.is_main:
        return
    if run.checking:
        for one in notes:
            run.log.warning("%s data: %s", mode, one)
        return
    told, findings = Told(dataset), [Finding.of_note(one) for one in notes]
    new = told.new(part, findings)
    told.remember(part, findings)
    path, is_long = run.work_dir / f"{mode}_{part}.txt", False
    try:
        is_long = write_places(path, notes, run.work_dir)
    except OSError as error:
        run.log.warning("%s could not be written: %s", relative(path), error.strerror or error)
    if not new:
        return
    if part == READERS:
        for line in lines(mode, new):
            run.log.warning("%s", line)
    else:  # a single one, which `detkernel doctor` has not
        run.log.warning("%s data: %s", mode, notes[0])
    if part == READERS and _is_kept(run):
        folder = shlex.quote(printable(as_typed(run.work_dir)))
        run.log.warning("`detkernel doctor %s` says where, and what to do about it", folder)
    elif is_long:
        run.log.warning("%s data: %s has every place of these warnings", mode, relative(path))


def _is_kept(run: Run) -> bool:
    """Whether its config lies in the work dir: `detkernel browse` and `profile` use one that is removed in the end."""
    options: Any = run.config.get("run", {})
    return "work_dir" in options and Path(str(options["work_dir"])) == run.work_dir


def _groups(
    options: Loader, run: Run, mode: Mode, dataset: Dataset, masks: bool, shapes: Sequence[Size]
) -> list[NDArray[np.int64]]:
    """The images that may share a batch."""
    if len(dataset) == 0:
        raise DataError(f"{mode} data: no image is left. {'; '.join(dataset.notes) or 'The data set is empty'}")
    everything = np.arange(len(dataset))
    labelled = mode == "train"
    if not labelled and len(shapes) < 2:
        return [everything]
    seen = overview(dataset)
    objects, wide = seen.objects, seen.widths >= seen.heights
    if not labelled:
        return by_aspect(everything, wide) if options.group_by_aspect else [everything]
    if masks:
        objects = objects - _missing_masks(options, run, dataset, objects)
    chosen = everything[objects > 0] if options.skip_empty else everything
    if len(chosen) == 0:
        raise DataError(
            f"train data: none of the {len(dataset)} images has an object to train on (crowds and difficult objects "
            "are not); check the annotations and the classes, or set data.skip_empty=false"
        )
    if len(chosen) < len(everything):
        left_out = f"{len(everything) - len(chosen)} of {len(everything)} images have no object: not trained on"
        _tell(run, mode, dataset, [f"{left_out} (data.skip_empty=false trains on them)"], "without_objects")
    if not options.group_by_aspect or options.sampler is not None:
        return [chosen]
    return by_aspect(chosen, wide)


def by_aspect(chosen: NDArray[np.int64], wide: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """Landscape images and portrait ones, of each kind that there is."""
    groups = [chosen[wide[chosen]], chosen[~wide[chosen]]]
    return [group for group in groups if len(group)]


def _missing_masks(options: Loader, run: Run, dataset: Dataset, objects: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of every image, how many of its objects are not trained on for want of a mask; they are reported."""
    missing = maskless(dataset)
    places: list[str] = []
    for index in np.flatnonzero(missing).tolist():
        notes = dataset.annotations(index)
        numbers = np.flatnonzero(trainable(notes) & without_mask(notes)).tolist()
        places += [f"{notes.path}: object {number + 1}" for number in numbers]
    if not places:
        return missing
    if len(places) == objects.sum():
        raise DataError("train data: no object has a mask, and the model is trained on masks; use data that has some")
    what = f"{len(places)} of {objects.sum()} objects have no mask, and the model is trained on masks"
    if options.missing_masks == "error":
        raise DataError(f"train data: {note(what, places)}; {MISSING}")
    done = "not trained on" if options.missing_masks == "drop" else "their boxes are taken as masks"
    told = note(f"{what}: {done}", places, "data.missing_masks: drop, box or error")
    _tell(run, "train", dataset, [told], "missing_masks")
    return missing if options.missing_masks == "drop" else np.zeros_like(missing)


def matched(dataset: Dataset, classes: Sequence[str], mode: str) -> Dataset:
    """The data set with the labels of a run's classes, matched by name. Raises `DataError` for a class it lacks."""
    if tuple(dataset.classes) == tuple(classes):
        return dataset
    for name in dataset.classes:
        if name not in classes:
            raise DataError(
                f"{mode} data: it has the class '{name}', which the training data has not"
                f"{did_you_mean(name, classes)}; both need the same classes "
                "(`class_names` and `rename_classes` of the data sets)"
            )
    return Relabelled(dataset, classes)


class Relabelled(Dataset):
    """A data set whose classes are a run's, in the run's order."""

    def __init__(self, dataset: Dataset, classes: Sequence[str]) -> None:
        self._dataset, self.classes, self.notes = dataset, tuple(classes), dataset.notes
        self.keypoint_names, self.category_ids = dataset.keypoint_names, dict(dataset.category_ids)
        self.fields, self.federated = dict(dataset.fields), dataset.federated
        self._labels = np.array([self.classes.index(name) for name in dataset.classes], dtype=np.int64)

    def load(self) -> None:
        """It is loaded."""

    def __len__(self) -> int:
        return len(self._dataset)

    def image(self, index: int) -> Tensor:
        return self._dataset.image(index)

    def annotations(self, index: int) -> Annotations:
        return self._relabelled(self._dataset.annotations(index))

    def truth(self, index: int) -> Annotations:
        return self._relabelled(self._dataset.truth(index))

    def _relabelled(self, notes: Annotations) -> Annotations:
        return attrs.evolve(notes, labels=self._labels[notes.labels])

    def overview(self) -> Overview:
        return overview(self._dataset)

    def maskless(self) -> NDArray[np.int64]:
        return maskless(self._dataset)

    def fingerprint(self) -> str:
        return self._dataset.fingerprint()
