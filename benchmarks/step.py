"""A training iteration through detkernel beside a plain torchvision loop: same model, batch, optimizer and threads.

    python benchmarks/step.py [--model torchvision_faster_rcnn] [--side 320] [--batch 2] [--pairs 40]

The two take turns, iteration by iteration, in one process. Two figures: the median of the ratios of neighbours, and the
ratio of the fastest iteration of each on the same batch (the median over the batches), which other work on the machine
changes least: it only ever lengthens an iteration. Both start from the same weights and get the same images as uint8;
the plain loop is torchvision's reference: a list of images in 0..1, `model(images, targets)`, the sum of losses,
backward, step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from detkernel.config import load
from detkernel.loop import Kernel, prepare
from torchvision.models.detection.transform import GeneralizedRCNNTransform

CONFIG = """
run: {{until: 100000 iters, work_dir: {work_dir}}}
device: {{channels_last: {channels_last}}}
data:
  use: loader
  train: {{use: shapes, size: 64, side: {side}, sizes: [20, {half}]}}
  batch_size: {batch}
  workers: 0
model: {{use: {model}, backbone: {{use: torchvision_resnet, depth: {depth}}}}}
optimizer: {{use: sgd, lr: 0.0001, momentum: 0.9, weight_decay: 1e-4}}
schedule: {{use: multistep, milestones: [50000 iters], warmup: 500 iters}}
check_invalid_loss: {{}}
check_classes: {{}}
signals: {{}}
checkpoint: {{every: 50000 iters}}
log: {{interval: 50}}
"""


class Plain:
    """The loop that one would write by hand."""

    def __init__(self, run: Any, background: bool) -> None:
        adapter = copy.deepcopy(run.bare_model)
        self.model = adapter.inner
        mean, std = (values.flatten().tolist() for values in (adapter.normalize.mean, adapter.normalize.std))
        self.model.transform = GeneralizedRCNNTransform(0, 0, mean, std)
        self.model.transform.resize = lambda image, target: (image, target)  # resized already, as for detkernel
        self.device, self.background = run.device, int(background)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def step(self, batch: Any) -> None:
        sizes = batch.sizes
        images = [
            image[:, :h, :w].to(self.device).float() / 255 for image, (h, w) in zip(batch.images, sizes, strict=True)
        ]
        targets = [
            {"boxes": target.boxes.to(self.device), "labels": target.labels.to(self.device) + self.background}
            for target in batch.each_target()
        ]
        loss = sum(self.model(images, targets).values())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def through_kernel(run: Any, batch: Any) -> None:
    """What the loop does between two batches."""
    run.hook.before_train_iter(run=run, batch=batch)
    losses = run.hook.train_step(run=run, model=run.model, batch=batch)
    run.advance()
    run.hook.after_train_iter(run=run, batch=batch, losses=losses)


def timed(run: Any, function: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision_faster_rcnn")
    parser.add_argument("--depth", default=18, type=int)
    parser.add_argument("--side", default=320, type=int)
    parser.add_argument("--batch", default=2, type=int)
    parser.add_argument("--pairs", default=40, type=int)
    parser.add_argument(
        "--contiguous", action="store_true", help="weights in NCHW in both, detkernel's default is NHWC"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = CONFIG.format(
            work_dir=folder, side=options.side, half=options.side // 2, batch=options.batch, model=options.model,
            depth=options.depth, channels_last=str(not options.contiguous).lower(),
        )  # fmt: skip
        path = Path(folder) / "config.yaml"
        path.write_text(text)
        config = load(path, [])
        kernel = Kernel(config.plugins, config.options)
        run = kernel.state
        prepare(run)
        run.hook.before_train_epoch(run=run)
        batches = list(run.loaders["train"].batches(0))[:4]
        plain = Plain(run, getattr(type(config.plugins["model"]), "background", False))
        ratios, ours, theirs = [], [], []
        fastest: dict[int, dict[str, float]] = {}
        for number in range(options.pairs + 2):
            batch = batches[number % len(batches)]
            pair: dict[str, float] = {}
            turns = [
                ("plain", plain.step, (copy.deepcopy(batch),)),
                ("ours", through_kernel, (run, copy.deepcopy(batch))),
            ]
            for name, function, arguments in turns if number // len(batches) % 2 else turns[::-1]:
                pair[name] = timed(run, function, *arguments)
            if number >= 2:  # the first ones warm up
                ratios.append(pair["ours"] / pair["plain"])
                ours.append(pair["ours"])
                theirs.append(pair["plain"])
                best = fastest.setdefault(number % len(batches), pair)
                best.update({name: min(best[name], pair[name]) for name in pair})
        run.hook.after_run(run=run)
    where = torch.cuda.get_device_name() if run.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    what = f"{options.model} R{options.depth}, {options.batch} images of {options.side} px"
    print(f"{what}, {where}, torch {torch.__version__}")
    print(f"plain torchvision {statistics.median(theirs) * 1000:8.1f} ms")
    print(f"detkernel         {statistics.median(ours) * 1000:8.1f} ms")
    shortest = statistics.median(best["ours"] / best["plain"] for best in fastest.values())
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ratio             {middle:8.3f}    (half of {len(ratios)} pairs within {low:.3f}..{high:.3f})")
    print(f"of the fastest    {shortest:8.3f}")


if __name__ == "__main__":
    main()
