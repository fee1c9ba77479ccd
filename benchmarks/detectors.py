"""The native detectors beside their peers: speed, memory, kernels and questions to the device, in one run.

    python benchmarks/detectors.py [--families retinanet fcos ...] [--ways peer eager compiled] [--side 800] [--batch 8]

Every way gets the same uint8 images and boxes, and each step is a whole iteration: to the device, forward, backward and
the optimizer's step. The peer is a loop by hand around torchvision's model (transformers' for the DETRs), under the
same autocast; ours goes through detkernel's loop and plugins. Times are medians of synchronised steps. What is counted
(launches, questions to the device, busy share) is counted in further steps, which are not timed. Ten minutes at most on
one GPU; without one, `--side 256 --batch 2 --precision fp32 --threads 1` compares on the CPU: the ways take turns
there, iteration by iteration, and the least CPU time of each counts, since other programs only ever lengthen one.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

CONFIG = """
run: {{until: 1000000 iters, work_dir: {folder}/run}}
device: {{device: {device}, precision: {precision}, threads: {threads}, compile: {compile}}}
data:
  use: loader
  train: {{use: coco, annotation_file: {folder}/annotations.json, image_folder: {folder}}}
  batch_size: {batch}
  workers: 0
  shuffle: false
  drop_last: true
model: {model}
optimizer: {optimizer}
schedule: {{use: multistep, milestones: [500000 iters], warmup: 500 iters}}
check_invalid_loss: {{}}
check_classes: {{}}
signals: {{}}
log: {{interval: 1000}}
"""

R50 = "backbone: {use: resnet, depth: 50, norm: frozen, trainable_layers: 3}"
SGD = "{use: sgd, lr: 0.00001, momentum: 0.9, weight_decay: 1e-4}"
ADAMW = "{use: adamw, lr: 0.000001, weight_decay: 1e-4, clip_norm: 0.1}"


class Family(NamedTuple):
    """A detector of ours, and what it is compared with."""

    model: str
    peer: str
    """A builder of torchvision.models.detection, or `transformers:` and a kind of its configurations."""
    optimizer: str = SGD
    masks: bool = False
    classes: int = 80


FPN = "neck: {use: fpn, extra_from: output, extra_relu: true}"
"""The coarse levels of torchvision's RetinaNet are made from the 256 channels of P5; by default ours are made from the
2,048 of C5, as MMDetection's."""

FAMILIES = {
    "retinanet": Family(f"{{use: retinanet, {R50}, {FPN}}}", "retinanet_resnet50_fpn"),
    "fcos": Family(f"{{use: fcos, {R50}}}", "fcos_resnet50_fpn"),
    "atss": Family(f"{{use: atss, {R50}}}", "fcos_resnet50_fpn"),
    "gfl": Family(f"{{use: gfl, {R50}}}", "fcos_resnet50_fpn"),
    "faster_rcnn": Family(f"{{use: faster_rcnn, {R50}}}", "fasterrcnn_resnet50_fpn"),
    "mask_rcnn": Family(f"{{use: mask_rcnn, {R50}}}", "maskrcnn_resnet50_fpn", masks=True),
    "dino": Family(f"{{use: dino, {R50}}}", "transformers:DeformableDetr", optimizer=ADAMW),
    "rtdetr": Family(
        "{use: rtdetr, backbone: {use: resnet, depth: 50, variant: vd, trainable_layers: 4, norm: frozen}}",
        "transformers:RTDetrV2",
        optimizer=ADAMW,
    ),
    "dfine": Family("{use: dfine}", "transformers:DFine", optimizer=ADAMW),
    "mlperf": Family(
        "{use: retinanet, backbone: {use: resnet, depth: 50, groups: 32, width_per_group: 4, "
        f"norm: frozen, trainable_layers: 3}}, {FPN}}}",
        "retinanet_resnext50_fpn",
        classes=264,
    ),
}
"""ATSS and GFL have no peer there; FCOS has the same towers, and one prior at every place as they have. Nor has DINO;
Deformable DETR has the same encoder and decoder, with a third of its queries and none that are denoised."""


class Measured(NamedTuple):
    """What was seen of a way."""

    first: float
    """Seconds of the first iteration, compilation included."""
    step: float
    """Median seconds of an iteration; on a CPU the least."""
    memory: float
    """GiB at the peak; NaN on a CPU."""
    busy: float
    """Share of the time in which the GPU computes; NaN on a CPU."""
    launches: float
    """Kernels an iteration."""
    questions: float
    """How often an iteration waits for the device."""


def write_images(folder: Path, side: int, count: int, classes: int, masks: bool) -> None:
    """Smooth noise, and three to sixteen boxes an image."""
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(count):
        small = random.integers(0, 256, (side // 16, side // 16, 3), dtype=np.uint8)
        Image.fromarray(small).resize((side, side)).save(folder / f"{number}.jpg")
        images.append({"id": number + 1, "file_name": f"{number}.jpg", "height": side, "width": side})
        for _ in range(random.integers(3, 17)):
            x, y = (float(value) for value in random.uniform(0, side * 0.6, 2))
            w, h = (float(value) for value in random.uniform(16, side * 0.3 + 16, 2))
            one = {"image_id": number + 1, "category_id": int(random.integers(1, classes + 1)), "bbox": [x, y, w, h]}
            outline = [x, y + h / 2, x + w / 2, y, x + w, y + h / 2, x + w / 2, y + h]
            one |= {"id": len(annotations) + 1, "area": w * h, "iscrowd": 0}
            annotations.append(one | ({"segmentation": [outline]} if masks else {}))
    categories = [{"id": number + 1, "name": f"class {number}"} for number in range(classes)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / "annotations.json").write_text(text)


def ours(
    family: Family, folder: Path, options: argparse.Namespace, compiled: bool
) -> tuple[Callable[[int], None], Any]:
    """An iteration of detkernel's loop, between two batches."""
    from detkernel.config import load
    from detkernel.loop import Kernel, prepare

    path = folder / "config.yaml"
    path.write_text(
        CONFIG.format(
            folder=folder, device=options.device, precision=options.precision, threads=options.threads or "null",
            compile=f"{{backend: {options.backend}}}" if compiled else "null", batch=options.batch, model=family.model,
            optimizer=family.optimizer,
        )
    )  # fmt: skip
    config = load(path, [])
    run = Kernel(config.plugins, config.options).state
    prepare(run)
    run.hook.before_train_epoch(run=run)
    batches = [pinned(batch) for batch in run.loaders["train"].batches(0)]

    def step(number: int) -> None:
        batch = fresh(batches[number % len(batches)])
        run.hook.before_train_iter(run=run, batch=batch)
        losses = run.hook.train_step(run=run, model=run.model, batch=batch)
        run.advance()
        run.hook.after_train_iter(run=run, batch=batch, losses=losses)

    return step, run


def pinned(batch: Any) -> Any:
    """As the loader's workers hand it over to a GPU."""
    if torch.cuda.is_available():
        buffer, layout, _ = batch.packed
        from detkernel_detection.batching import Packed

        packed = Packed(
            batch.images, buffer, layout, batch.counts, batch.indices, batch.image_ids, batch.sizes,
            batch.original_sizes, batch.scales, batch.extras,
        )  # fmt: skip
        return packed.pin_memory()
    return batch


def fresh(batch: Any) -> Any:
    """A batch that has not been moved to the device yet."""
    import copy

    return batch.unpack() if hasattr(batch, "unpack") else copy.copy(batch)


def peer(family: Family, folder: Path, options: argparse.Namespace) -> Callable[[int], None]:
    """The loop that one writes by hand."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    images, targets = read(folder, options)
    if family.peer.startswith("transformers:"):
        forward, model = transformers_peer(family, device)
    else:
        forward, model = torchvision_peer(family, device, options.side)
    model.to(device).to(memory_format=torch.channels_last).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if family.optimizer == SGD:
        optimizer: Any = torch.optim.SGD(trained, lr=1e-5, momentum=0.9, weight_decay=1e-4)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-6, weight_decay=1e-4)
    cast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)

    def step(number: int) -> None:
        place = number % (len(images) // options.batch) * options.batch
        some = slice(place, place + options.batch)
        with torch.autocast(device.type, cast, enabled=cast is not None):
            loss = forward(images[some], targets[some])
        optimizer.zero_grad()
        loss.backward()
        if family.optimizer == ADAMW:
            torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()

    return step


def read(folder: Path, options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Images uint8 [3, H, W] and what is on them, in page-locked memory where there is a GPU."""
    held = json.loads((folder / "annotations.json").read_text())
    images, targets = [], []
    for one in held["images"]:
        image = torch.from_numpy(np.array(Image.open(folder / one["file_name"]))).permute(2, 0, 1).contiguous()
        found = [note for note in held["annotations"] if note["image_id"] == one["id"]]
        boxes = torch.tensor([note["bbox"] for note in found])
        boxes[:, 2:] += boxes[:, :2]
        target = {"boxes": boxes, "labels": torch.tensor([note["category_id"] - 1 for note in found])}
        if "segmentation" in found[0]:
            from pycocotools import mask

            side = options.side
            masks = [mask.decode(mask.frPyObjects(note["segmentation"], side, side))[..., 0] for note in found]
            target["masks"] = torch.from_numpy(np.stack(masks))
        if torch.cuda.is_available():
            image, target = image.pin_memory(), {name: value.pin_memory() for name, value in target.items()}
        images.append(image)
        targets.append(target)
    return images, targets


def torchvision_peer(family: Family, device: torch.device, side: int) -> tuple[Any, Any]:
    from torchvision.models import detection, resnext50_32x4d
    from torchvision.models.detection import backbone_utils
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    from torchvision.ops.misc import FrozenBatchNorm2d

    background = int("rcnn" in family.peer)
    given: Any = {"num_classes": family.classes + background, "min_size": side, "max_size": side}
    if family.peer == "retinanet_resnext50_fpn":
        body = resnext50_32x4d(weights=None, norm_layer=FrozenBatchNorm2d)
        extra = LastLevelP6P7(256, 256)
        made = backbone_utils._resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
        model: Any = detection.RetinaNet(made, **given)
    else:
        builder = getattr(detection, family.peer)
        model = builder(weights=None, weights_backbone=None, trainable_backbone_layers=3, **given)
        body = model.backbone.body
        for name, child in list(body.named_children()):
            freeze_norms(child, name, body)
            if name in ("conv1", "bn1", "layer1"):
                child.requires_grad_(False)
    for name, buffer in model.named_buffers():
        if name.endswith("bn3.weight"):
            buffer.fill_(0.2)  # random weights behind constant norms would else grow from block to block
    model.transform.resize = lambda image, target: (image, target)

    def forward(images: Any, targets: Any) -> Any:
        here = [image.to(device, non_blocking=True).float() / 255 for image in images]
        there = [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in targets]
        for target in there:
            target["labels"] = target["labels"] + background
        return sum(model(here, there).values())

    return forward, model


def freeze_norms(module: Any, name: str, parent: Any) -> None:
    """torchvision freezes batch norm only where it loads weights."""
    from torchvision.ops.misc import FrozenBatchNorm2d

    if isinstance(module, torch.nn.BatchNorm2d):
        setattr(parent, name, FrozenBatchNorm2d(module.num_features))
    for inner, child in list(module.named_children()):
        freeze_norms(child, inner, module)


def transformers_peer(family: Family, device: torch.device) -> tuple[Any, Any]:
    import transformers

    kind = family.peer.removeprefix("transformers:")
    options = getattr(transformers, f"{kind}Config")(num_labels=family.classes)
    if hasattr(options, "use_pretrained_backbone"):
        options.use_pretrained_backbone = False
    model = getattr(transformers, f"{kind}ForObjectDetection")(options)

    def forward(images: Any, targets: Any) -> Any:
        batch = torch.stack([image.to(device, non_blocking=True) for image in images]).float() / 255
        side = batch.shape[-1]
        labels = []
        for target in targets:
            boxes = target["boxes"].to(device, non_blocking=True) / side
            centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
            classes = target["labels"].to(device, non_blocking=True)
            labels.append({"class_labels": classes, "boxes": torch.cat([centre, sides], 1)})
        return model(pixel_values=batch.contiguous(memory_format=torch.channels_last), labels=labels).loss

    return forward, model


def measured(step: Callable[[int], None], options: argparse.Namespace) -> Measured:
    """Time the first step and the median of the others, then count what they do."""
    cuda = torch.cuda.is_available()
    wait = torch.cuda.synchronize if cuda else lambda: None
    first = timed(step, 0, wait)
    for number in range(1, options.warmup):
        step(number)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = [timed(step, number, wait) for number in range(options.iterations)]
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    busy, launches = profiled(step, options.kernels) if cuda else (float("nan"), float("nan"))
    asked = float(questions(step)) if cuda else float("nan")
    return Measured(first, statistics.median(times), memory, busy, launches, asked)


def timed(step: Callable[[int], None], number: int, wait: Callable[[], None]) -> float:
    """Seconds; without a GPU those of the CPU, which other programs do not change."""
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    began = clock()
    step(number)
    wait()
    return clock() - began


def profiled(step: Callable[[int], None], shown: int, count: int = 3) -> tuple[float, float]:
    """The share of the time in which a kernel runs, and kernels an iteration. The `shown` longest are printed."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for number in range(count):
            step(number)
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in seen.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if shown:
        print(seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=shown, max_name_column_width=70))
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / (spans[-1][1] - spans[0][0]), len(spans) / count


def questions(step: Callable[[int], None]) -> int:
    """How often torch says that a step waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in said)


def measure(family: Family, way: str, folder: Path, options: argparse.Namespace) -> Measured:
    torch.manual_seed(0)
    torch.compiler.reset()
    if way == "peer":
        return measured(peer(family, folder, options), options)
    step, run = ours(family, folder, options, way == "compiled")
    try:
        return measured(step, options)
    finally:
        run.hook.after_run(run=run)


def in_turn(family: Family, folder: Path, options: argparse.Namespace) -> dict[str, Measured]:
    """On a CPU: all ways at once. Which of the two batches an iteration has is the same for all."""
    torch.manual_seed(0)
    steps, runs = {}, []
    for way in options.ways:
        if way == "peer":
            steps[way] = peer(family, folder, options)
        else:
            steps[way], run = ours(family, folder, options, way == "compiled")
            runs.append(run)
    first = {way: timed(step, 0, lambda: None) for way, step in steps.items()}
    for number in range(1, options.warmup):
        for step in steps.values():
            step(number)
    least: dict[str, list[float]] = {way: [float("inf")] * 2 for way in steps}
    for number in range(options.iterations):
        for way, step in sorted(steps.items(), reverse=number % 4 >= 2):
            least[way][number % 2] = min(least[way][number % 2], timed(step, number, lambda: None))
    for run in runs:
        run.hook.after_run(run=run)
    nan = float("nan")
    return {way: Measured(first[way], statistics.mean(least[way]), nan, nan, nan, nan) for way in steps}


def prepare(options: argparse.Namespace) -> None:
    """Compile every family once, each in a process of its own: what they find is kept in Inductor's cache."""
    began = time.monotonic()
    given = [f"--{name}={getattr(options, name)}" for name in ("side", "batch", "precision", "backend")]
    command = [sys.executable, __file__, "--ways", "compiled", "--iterations", "1", "--warmup", "1", *given]
    running = [subprocess.Popen([*command, "--families", name], stdout=subprocess.DEVNULL) for name in options.families]
    for process in running:
        process.wait()
    print(f"{len(running)} families compiled in {time.monotonic() - began:.0f} s")


def row(name: str, way: str, seen: Measured, beside: Measured | None, batch: int) -> str:
    cells = [name, way, f"{seen.step * 1000:.1f}", f"{batch / seen.step:.1f}"]
    cells.append(f"{beside.step / seen.step:.2f}" if beside else "")
    if seen.memory == seen.memory:
        cells += [f"{seen.memory:.1f}", f"{seen.memory / beside.memory:.0%}" if beside else ""]
        cells += [f"{seen.busy:.0%}", f"{seen.launches:.0f}", f"{seen.questions:.0f}"]
    else:
        cells += [""] * 5  # only a GPU tells
    return f"| {' | '.join([*cells, f'{seen.first:.1f}'])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--ways", nargs="+", default=["peer", "eager", "compiled"])
    parser.add_argument("--side", default=800, type=int)
    parser.add_argument("--batch", default=16, type=int)
    parser.add_argument("--iterations", default=20, type=int)
    parser.add_argument("--warmup", default=4, type=int, help="iterations before those that are timed")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument(
        "--prepare", action="store_true", help="first fill the compiler's cache, for all families at the same time"
    )
    parser.add_argument("--kernels", default=0, type=int, help="print so many of the longest kernels of every way")
    parser.add_argument("--minutes", default=9.5, type=float, help="no further model is begun after so many")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.monotonic()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore", message="Changing trainable_backbone_layers")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu, {options.threads} threads"
    if options.prepare:
        prepare(options)
    sizes = f"{options.batch} images of {options.side}x{options.side}, {options.precision}"
    print(f"{sizes}, {where}, torch {torch.__version__}")
    print("| family | way | ms | images/s | x peer | GiB | of peer | busy | launches | questions | first, s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in options.families:
        family = FAMILIES[name]
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            write_images(folder, options.side, 2 * options.batch, family.classes, family.masks)
            beside = None
            if options.device == "cpu":
                found = in_turn(family, folder, options)
                for way, seen in found.items():
                    print(row(name, way, seen, found.get("peer") if way != "peer" else None, options.batch), flush=True)
                continue
            for way in options.ways:
                if time.monotonic() - began > options.minutes * 60:
                    print(f"| {name} | {way} | not begun: {options.minutes} minutes are over |", flush=True)
                    continue
                try:
                    seen = measure(family, way, folder, options)
                except Exception as error:
                    print(f"| {name} | {way} | {type(error).__name__}: {str(error)[:300]} |", flush=True)
                    continue
                finally:
                    gc.collect()
                    if options.device == "cuda":
                        torch.cuda.empty_cache()
                beside = seen if way == "peer" else beside
                print(row(name, way, seen, beside if way != "peer" else None, options.batch), flush=True)


if __name__ == "__main__":
    main()
