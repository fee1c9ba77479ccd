"""The command `detkernel export`: a checkpoint as a file for other programs, checked against the original."""

from __future__ import annotations

import importlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from detkernel import UserError
from detkernel.errors import relative
from detkernel.terminal import wrapped

if TYPE_CHECKING:
    from detkernel_detection.predictions import Predictions
    from torch import Tensor

    from detkernel_export.model import Model

_TESTED = ("build_loader", "before_val_iter", "after_val_iter", "after_val_set")
"""Whoever answers one of these has a part in a test of the file; all others stay out of its config."""
_PROBES = ((1000, 1000), (750, 1000), (1000, 750), (500, 1000), (1000, 500))
"""Sizes of images by which it is seen how large the transforms make them."""
_CHECKED = 4


@click.command(epilog="\b\nFor example:\n  detkernel export runs/shapes/checkpoints/best.pt")
@click.argument("checkpoint")
@click.option("--to", "form", type=click.Choice(["onnx", "torch-export"]), default="onnx", show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="the file; by default beside the checkpoint")
@click.option("--size", metavar="HxW", help="of the images, in pixels; by default what the transforms make")
@click.option("--dynamic-size", is_flag=True, help="any size, where the model allows it")
@click.option("--tolerance", type=click.FloatRange(min=0), default=1e-4, show_default=True, help="largest difference")
@click.option("--config", help="that of weights without one, such as others publish")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="change the config; repeatable")
def export(
    checkpoint: str,
    form: str,
    output: Path | None,
    size: str | None,
    dynamic_size: bool,
    tolerance: float,
    config: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Write a detector as an ONNX or torch.export file, checked.

    Normalising, padding, scores, NMS are in the file; images are resized before it, by the transforms that it holds. It
    finds what the original finds, or else it is not written.
    """
    _require(form)
    from detkernel_export.model import checkpoint_of, load

    checkpoint = checkpoint_of(checkpoint)
    suffix = ".onnx" if form == "onnx" else ".pt2"
    target = output or Path(checkpoint).with_suffix(suffix)
    if target.suffix != suffix:
        raise UserError(f"{relative(target)}: expected a file that ends with {suffix}")
    with load(checkpoint, config=config, device="cpu", overrides=overrides) as model:
        lines = write(model, target, form, size=size, dynamic=dynamic_size, tolerance=tolerance)
    for line in lines:
        click.echo(wrapped(line, "  ", ""))


def _require(form: str) -> None:
    """Raise `UserError` that says what to install."""
    if form != "onnx":
        return
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            raise UserError(f"{name} is not installed: pip install 'detkernel-export[onnx]'") from None


def write(
    model: Model, target: Path, form: str, *, size: str | None = None, dynamic: bool = False, tolerance: float = 1e-4
) -> Iterator[str]:
    """Export a model into a file, and compare; gives lines that say what was done. Raises `UserError`, and then there
    is no new file."""
    import torch
    from detkernel_detection.detector import Detector

    from detkernel_export import graph

    network = model.module
    if not isinstance(network, Detector):
        raise UserError(
            f"{model.name}: {type(network).__name__} is not a detector of detkernel's; it cannot be exported"
        )
    if network.unexportable:
        used = model.config.plain[model.answering("build_model")[0]].get("use", type(network).__name__)
        raise UserError(f"{model.name}: {used} cannot be exported: {network.unexportable}; {graph.INSTEAD}")
    multiple = network.normalize.size_divisible
    height, width = _size(model, size, multiple)
    with torch.no_grad():
        first: Any = network(torch.zeros(1, 3, height, width, dtype=torch.uint8), None, torch.tensor([[height, width]]))
    outputs = graph.outputs_of(first)
    held = _held(model, outputs, (height, width), multiple if dynamic else None)
    made = graph.program(graph.Graph(network), (height, width), held["multiple"])
    shape = f"{width}x{height}"
    if dynamic:
        held["smallest"], held["largest"] = graph.limits(made, multiple)
        (low, narrow), (high, wide) = held["smallest"], held["largest"]
        held["size"] = [max(height, low), max(width, narrow)]
        shape = f"any size from {narrow}x{low} to {wide}x{high} (multiples of {multiple})"
    with _beside(target) as temporary:
        if form == "onnx":
            graph.onnx_file(made, str(temporary), outputs, {"detkernel": json.dumps(held)})
        else:
            with warnings.catch_warnings():
                # torch says of weights that are parts of others that they may be wrong; the check below would see it
                warnings.filterwarnings("ignore", "No complete tensor found in the group", UserWarning)
                torch.export.save(made, temporary, extra_files={"detkernel.json": json.dumps(held)})
        told = _checked(model, temporary, form, held, tolerance)
        temporary.replace(target)
    if form != "onnx":
        from detkernel_export.torch_file import remember

        remember(target)
    yield f"wrote {relative(target)} ({target.stat().st_size / 1e6:.1f} MB): any number of images of {shape}"
    yield told
    yield f"next: detkernel test {relative(target)}"


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A file that becomes the target in the end, or is removed."""
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise UserError(f"{relative(target)}: cannot be written: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _size(model: Model, given: str | None, multiple: int) -> tuple[int, int]:
    """(height, width) of the file's images: as given, or the largest that the transforms make of any image."""
    import torch
    from detkernel_detection.predictor import make_sample

    if given is not None:
        parts = given.lower().split("x")
        if len(parts) != 2 or not all(part.isdecimal() and 0 < int(part) <= 8192 for part in parts):
            raise UserError(f"--size: expected height x width in pixels, such as 480x640, got '{given}'")
        sides = int(parts[0]), int(parts[1])
    else:
        made = []
        for probe in _PROBES:
            sample = make_sample(torch.zeros((3, *probe), dtype=torch.uint8), 0, model.transforms)
            made.append(sample.size)
        if any(size == probe for size, probe in zip(made, _PROBES, strict=True)):
            raise UserError(
                "--size: its transforms leave images as large as they are, so that nobody knows how large they may be; "
                "give the largest, such as --size 480x640"
            )
        sides = max(height for height, _ in made), max(width for _, width in made)
    return -(-sides[0] // multiple) * multiple, -(-sides[1] // multiple) * multiple


def _held(model: Model, outputs: Sequence[str], size: tuple[int, int], multiple: int | None) -> dict[str, Any]:
    """What the file says of itself: classes, how it is used, and the config to test it with."""
    from detkernel_export.exported import FORMAT

    network = model.module
    plain = json.loads(json.dumps(dict(model.config.plain)))
    key = model.answering("build_model")[0]
    tested = {name for event in _TESTED for name in model.answering(event)} - {key}
    tested |= {name for name, part in plain.items() if isinstance(part, dict) and part.get("use", name) == "log"}
    kept = {name: part for name, part in plain.items() if name in tested or name == "run"}
    kept["run"] = {**kept["run"], "work_dir": str(_run_folder(Path(model.name)))}
    for part in kept.values():
        if part.get("compile"):
            part["compile"] = None
    return {
        "format": FORMAT,
        "classes": list(model.classes),
        "keypoints": list(model.keypoint_names),
        "outputs": list(outputs),
        "size": list(size),
        "multiple": multiple,
        "max_detections": network.max_detections,
        "mask_space": network.mask_space,
        "mask_paste": network.mask_paste,
        "mask_threshold": network.mask_threshold,
        "images": "uint8 RGB [batch, 3, height, width], padded with 0 at the right and the bottom",
        "sizes": "int64 [batch, 2]: height and width of each image without the padding",
        "model": key,
        "best_score": model.best_score,
        "config": kept,
    }


def _run_folder(checkpoint: Path) -> Path:
    """The work dir of its run, where it lies in one: a test of the file writes there, if the file lies there too."""
    folders = checkpoint.resolve().parents
    return next((folder for folder in folders[:2] if (folder / "config.yaml").is_file()), folders[0])


def _checked(model: Model, path: Path, form: str, held: dict[str, Any], tolerance: float) -> str:
    """A line that says how far the file is from the original. Raises `UserError` where that is too far."""
    import torch

    images, sizes, what = _images(model, tuple(held["size"]))
    run = _runner(path, form, held)
    worst = {"score": 0.0, "box": 0.0, "mask": 0.0, "keypoint": 0.0}
    count = 0
    resized = [_resized(images, size) for size in _other_sizes(held)]
    for batch, theirs in [(images[:1], sizes[:1]), *resized, (images, sizes)]:
        with torch.no_grad():
            wanted = model.module(batch, None, theirs)
        found = run(batch, theirs)
        count = int(wanted.valid.sum())
        for name, value in differences(found, wanted, max(batch.shape[-2:])).items():
            worst[name] = max(worst[name], value)
    by = "ONNX Runtime" if form == "onnx" else "torch.export"
    names = {"score": "scores", "box": "boxes", "mask": "masks", "keypoint": "keypoints"}
    told = ", ".join(f"{names[name]} {value:.1e}" for name, value in worst.items() if value or name in ("score", "box"))
    line = f"checked with {by}: {count} detections in {what}; largest difference: {told} (boxes in parts of the image)"
    if not max(worst.values()) <= tolerance:
        raise UserError(f"the file does not find what the original does: it was removed; {line}, allowed {tolerance:g}")
    return line


def _other_sizes(held: dict[str, Any]) -> list[tuple[int, int]]:
    """Where a file takes images of any size: the smallest, and one of another form than it was made with."""
    if held["multiple"] is None:
        return []
    height, width = (
        min(max(least, side + more * held["multiple"]), most)
        for least, side, more, most in zip(held["smallest"], held["size"][::-1], (3, 1), held["largest"], strict=True)
    )
    return [held["smallest"], (height, width)]


def _resized(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The images with what is around them, to the nearest pixel, and their sizes."""
    import torch

    found = torch.nn.functional.interpolate(images, size)
    return found, torch.tensor([size] * len(images))


def _runner(path: Path, form: str, held: dict[str, Any]) -> Any:
    import torch
    from detkernel_detection.predictions import Predictions

    if form == "onnx":
        from detkernel_export.session import OnnxDetector

        detector = OnnxDetector(path, held, held["classes"], "cpu")
        return lambda images, sizes: detector(images, None, sizes)
    module = torch.export.load(path).module()

    def run(images: Tensor, sizes: Tensor) -> Predictions:
        with torch.no_grad():
            return Predictions(**dict(zip(held["outputs"], module(images, sizes), strict=True)))

    return run


def _images(model: Model, size: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
    """Some images to compare on: of the validation data, or made up where there is none."""
    import torch
    from detkernel_detection.batching import pack_samples
    from detkernel_detection.predictor import make_sample

    data = model.data
    datasets = [getattr(data, name, None) for name in ("val", "test", "train")]
    dataset = next((one for one in datasets if one is not None), None)
    pixels: list[Tensor] = []
    try:
        if dataset is not None:
            dataset.load()
            pixels = [dataset.image(number) for number in range(min(_CHECKED, len(dataset)))]
    except UserError:
        pixels = []
    what = f"{len(pixels)} images of the data"
    if not pixels:
        draw = torch.Generator().manual_seed(0)
        pixels = [torch.randint(0, 256, (3, 8, 8), generator=draw, dtype=torch.uint8) for _ in range(_CHECKED)]
        pixels = [one.repeat_interleave(size[0] // 8, 1).repeat_interleave(size[1] // 8, 2) for one in pixels]
        what = f"{len(pixels)} made-up images (the data cannot be read)"
    samples = [make_sample(one, number, model.transforms) for number, one in enumerate(pixels)]
    batch = pack_samples(samples, size).unpack()
    # Channels first, as in the file: with channels last, torch's group norm is less exact, by 1e-5 of a score and more.
    return batch.images.contiguous(), batch.image_sizes, what


def differences(found: Predictions, wanted: Predictions, side: int) -> dict[str, float]:
    """The largest ones, by kind: of scores, of boxes in parts of an image's side. Each detection is compared with the
    nearest one of its class: two whose scores are equal but for rounding may have changed places."""
    import torch

    worst = {"score": 0.0, "box": 0.0, "mask": 0.0, "keypoint": 0.0}
    for number in range(len(wanted.valid)):
        here, there = found.valid[number], wanted.valid[number]
        if int(here.sum()) != int(there.sum()):
            worst["score"] = float("inf")
            continue
        if not there.any():
            continue
        boxes, labels, scores = found.boxes[number][here], found.labels[number][here], found.scores[number][here]
        box = (boxes[None] - wanted.boxes[number][there][:, None]).abs().amax(-1) / side
        score = (scores[None] - wanted.scores[number][there][:, None]).abs()
        other = labels[None] != wanted.labels[number][there][:, None]
        nearest = (box + score + other * 1e6).argmin(1)
        rows = torch.arange(len(nearest))
        worst["score"] = max(worst["score"], float((score + other * 1e6)[rows, nearest].max()))
        worst["box"] = max(worst["box"], float(box[rows, nearest].max()))
        for name, scale in (("masks", 1), ("keypoints", side)):
            mine, theirs = getattr(found, name), getattr(wanted, name)
            if theirs is not None:
                gap = (mine[number][here][nearest].float() - theirs[number][there].float()).abs().max()
                worst[name[:-1]] = max(worst[name[:-1]], float(gap) / scale)
    return worst
