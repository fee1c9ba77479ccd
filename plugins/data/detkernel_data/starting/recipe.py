"""Chooses a small detector, image sizes and a length for a data set and a machine, and writes the config."""

from __future__ import annotations

import os
from typing import Any

import attrs
import numpy as np
from detkernel.config.dump import inline

from detkernel_data.starting.parts import Survey

WIDTH = 100
_FEW = 30
"""Boxes a class: of 11, a training of minutes learns next to nothing."""
NEEDED = (
    *("fcos", "mobilenet_v3", "fpn", "towers", "adamw", "one_cycle", "ema", "coco_map", "checkpoint", "log"),
    *("draw_predictions", "report", "device", "signals", "check_invalid_loss", "check_classes"),
)
"""Plugins of other distributions that the config names."""


@attrs.frozen
class Machine:
    """What will train."""

    gpu: str
    """The name of the GPU, or empty."""
    cores: int

    @classmethod
    def here(cls) -> Machine:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(torch.cuda.get_device_name() if torch.cuda.is_available() else "", cores)

    def __str__(self) -> str:
        return self.gpu or f"{self.cores} CPU core{'s' if self.cores > 1 else ''}"

    @property
    def longest(self) -> int:
        """The longer side, in pixels, of images that train at a bearable speed."""
        if self.gpu:
            return 960
        return 320 if self.cores <= 4 else 448 if self.cores <= 8 else 576

    @property
    def images(self) -> int:
        """Images of that size that train in some ten minutes: a core of a CPU does four a second."""
        return 40_000 if self.gpu else min(1_500 * max(self.cores, 2), 20_000)


@attrs.frozen
class Choice:
    """What the config says of images, batches and length."""

    resize: dict[str, Any]
    """Options of `resize` in validation; training takes the same."""
    batch_size: int
    iterations: int
    epochs: int | None
    """None: the length is told in iterations, where an epoch is very short, or longer than the whole run."""
    layers: list[int]
    """Blocks of MobileNetV3 whose maps are used: strides 8, 16 and perhaps 32."""
    smallest: float
    """The side of a small object (a tenth of them is smaller), in pixels of the resized image."""
    few: bool = False
    """Whether there are so few boxes of each class that hardly anything is learnt from random weights."""


def choose(data: Survey, machine: Machine) -> Choice:
    """By the images' shapes, the objects' sizes, and what the machine can do."""
    longest = np.median(data.sizes.max(1))
    # objects of 10 pixels are seen by maps of stride 8, smaller ones hardly: rather larger images than such
    small = float(np.quantile(data.scale, 0.1)) if len(data.scale) else 0.1
    seen = len(np.unique(np.concatenate(data.labels))) if data.labels else 0
    few = 0 < len(data.scale) < _FEW * seen
    largest = 1.0 if few else 1.6  # what is hard to learn wants iterations more than it wants pixels
    long = int(np.clip(10 / max(small, 1e-6), machine.longest, largest * machine.longest))
    long = max(128, int(min(long, max(longest, 128))) // 32 * 32)
    aspect = data.sizes[:, 1] / data.sizes[:, 0]
    low, high = np.quantile(aspect, [0.02, 0.98])
    if high / low < 1.06:  # one shape: batches without padding
        middle = float(np.median(aspect))
        height, width = (long / middle, long) if middle >= 1 else (long, long * middle)
        resize: dict[str, Any] = {"size": [_rounded(height), _rounded(width)]}
    else:
        resize = {"short": _rounded(long * 0.75), "long": long}
    images = len(data.ids)
    batch = min(16 if machine.gpu else 4, images)
    wanted = machine.images * (machine.longest / long) ** 2 * (2 if few else 1)
    iterations = int(np.clip(wanted / batch, 300, 20_000)) // 30 * 30
    length = -(-images // batch)
    epochs = round(iterations / length / 3) * 3  # validated after each third
    told = epochs if length >= 10 and epochs >= 3 else None
    large = float(np.quantile(data.scale, 0.9)) * long if len(data.scale) else 0.0
    layers = [6, 12, 15] if large > 192 else [6, 12]
    return Choice(resize, batch, told * length if told else iterations, told, layers, small * long, few)


def _rounded(side: float) -> int:
    return max(32, round(side / 16) * 16)


def config_text(
    title: list[str], splits: dict[str, dict[str, Any]], choice: Choice, machine: Machine, work_dir: str
) -> str:
    """The config: every line that somebody may want to change has a comment."""
    epochs = choice.epochs
    if epochs is None:
        until, every = f"{choice.iterations} iters", f"every {choice.iterations // 3} iters"
    else:
        until, every = f"{epochs} epochs", f"every {epochs // 3} epochs"
    ramp = max(50, choice.iterations // 10)
    lines = [
        *(f"# {line}" for line in title),
        "run:",
        f"  until: {until}  # short, to see it learn: three times as long gives better detectors",
        f"  validate: {every}",
        "  seed: 0",
        f"  work_dir: {inline(work_dir)}",
        "data:",
        "  use: loader",
        *(line for name, value in splits.items() for line in _split_lines(name, value)),
        f"  train_transforms: {inline([{'use': 'resize', **choice.resize}, 'flip', 'color'])}",
        f"  val_transforms: {inline([{'use': 'resize', **choice.resize}])}  # larger images: better, and slower",
        f"  batch_size: {choice.batch_size}",
        *(["  workers: 1  # loading processes: this machine has few cores"] if machine.cores <= 2 else []),
        "model:",
        "  use: fcos  # `detkernel plugins` lists the others",
        "  backbone:",
        "    use: mobilenet_v3",
        f"    layers: {choice.layers}  # its maps of strides {', '.join(['8', '16', '32'][: len(choice.layers)])}",
        "    weights: null  # random. `DEFAULT`: torchvision's of ImageNet (downloads 22 MB), which learn sooner",
        "  neck: {use: fpn, channels: 64, extra: 0}",
        "  head: {use: towers, convs: 2, channels: 64, groups: 8}",
        "optimizer: {use: adamw, lr: 2e-3, weight_decay: 0.05, clip_norm: 10}",
        "schedule: {use: one_cycle, rise: 0.2}",
        f"ema: {{decay: 0.99, ramp: {ramp}}}",
        "evaluation: {use: coco_map, per_class: true}",
        f"checkpoint: {{every: {every.removeprefix('every ')}, keep: 2, best: coco/bbox_mAP}}",
        f"log: {{interval: {int(np.clip(choice.iterations // 30, 1, 50))}}}",
        "draw_predictions: {}",
        "report: {}  # report.html in the work dir: how the run went, and what to improve first",
        "device: {}  # the GPU where there is one, else the CPU",
        "signals: {}  # Ctrl-C saves a checkpoint, and `detkernel run` goes on from it",
        "check_invalid_loss: {}",
        "check_classes: {}",
    ]
    return "\n".join(lines) + "\n"


def _split_lines(name: str, value: dict[str, Any]) -> list[str]:
    """A data set in one line where it fits, else in several."""
    text = f"  {name}: {inline(value)}"
    return [text] if len(text) <= WIDTH else [f"  {name}:", *_block(value, 4)]


def _block(value: dict[str, Any], indent: int) -> list[str]:
    pad, lines = " " * indent, []
    for key, item in value.items():
        text = f"{pad}{key}: {inline(item)}"
        if len(text) <= WIDTH or not isinstance(item, (dict, list)) or not item:
            lines.append(text)
        elif isinstance(item, dict):
            lines += [f"{pad}{key}:", *_block(item, indent + 2)]
        else:
            lines.append(f"{pad}{key}:")
            for one in item:
                lines += _item(one, indent + 2)
    return lines


def _item(value: Any, indent: int) -> list[str]:
    pad = " " * indent
    text = f"{pad}- {inline(value)}"
    if len(text) <= WIDTH or not isinstance(value, dict):
        return [text]
    first, *others = _block(value, indent + 2)
    return [f"{pad}- {first.lstrip()}", *others]
