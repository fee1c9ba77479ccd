"""Kills a whole run at random instants, resumes it each time, and says as JSON whether its end is the undisturbed one.

    python tests/torture.py FOLDER SEED KILLS PROCESSES

The run is the real thing: loader workers (0 to 3, other ones after each kill), random augmentation, dropout,
accumulation, bf16, clipping, an average of the weights, a schedule, validations, a log, and checkpoints in the
background. It is forked from a process that has torch loaded, since starting Python takes longer than the run.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

BACKBONE = '''
from typing import Any

from detkernel import option, plugin
from detkernel_detection import Backbone


@plugin
class Tiny(Backbone):
    """Three convolutions, with batch norm and dropout."""

    width: int = option(default=16, help="channels")

    def build(self) -> Any:
        from torch import nn

        class Body(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.channels, self.strides = [width, width], [8, 16]
                self.stem = nn.Sequential(nn.Conv2d(3, width, 8, 8), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1))
                self.more = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())

            def forward(self, images: Any) -> Any:
                fine = self.stem(images)
                return {"0": fine, "1": self.more(fine)}

        return Body(self.width)
'''
CONFIG = """
run: {until: 4 epochs, validate: every 9 iters, seed: 3}
device: {timeout: 0.5, threads: 1, precision: bf16}
data:
  use: loader
  train: {use: shapes, size: 20, side: 64, sizes: [12, 40]}
  val: {use: shapes, size: 5, side: 64, sizes: [12, 40], split: val}
  train_transforms: [flip, {use: crop, probability: 0.5}, color, {use: resize, size: [64, 64]}]
  batch_transforms: [{use: multi_scale, between: [64, 96], every: 2}]
  batch_size: 2
model: {use: torchvision_fcos, backbone: {use: ./backbone.py:Tiny}, neck_channels: 64, head_convs: 1}
optimizer: {use: adamw, lr: 1e-3, accumulate: 3, clip_norm: 5}
schedule: {use: cosine, warmup: 5 iters}
ema: {decay: 0.9, ramp: 10}
evaluation: {use: coco_map, backend: pycocotools}  # hotcoco has threads, which a fork leaves behind
log: {interval: 3}
checkpoint: {every: 2 iters, keep: 3, best: coco/bbox_mAP}
check_invalid_loss: {interval: 1}
signals: {}
"""


def train(folder: Path, work_dir: Path, workers: int, *more: str) -> None:
    from detkernel.config import load
    from detkernel.loop import Kernel

    config = load(folder / "config.yaml", [f"run.work_dir={work_dir}", f"data.workers={workers}", *more])
    Kernel(config.plugins, config.options, config=config.plain, versions=config.versions).run()


def start(folder: Path, work_dir: Path, workers: int, processes: int) -> list[int]:
    """Fork the processes of a run; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [_fork(folder, work_dir, workers, rank, processes, port) for rank in range(processes)]


def _fork(folder: Path, work_dir: Path, workers: int, rank: int, processes: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.setpgid(0, 0)
        if processes > 1:
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in places.items()}, MASTER_ADDR="127.0.0.1")
        train(folder, work_dir, workers)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(pids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kill(pids: list[int]) -> None:
    """The processes and their loader workers, at once."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(pid, signal.SIGKILL)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or one != one)


def outcome(work_dir: Path) -> dict[str, Any]:
    """What a run leaves, less what is of the clock."""
    last = max((work_dir / "checkpoints").glob("iter_*.pt"), key=lambda path: int(path.stem[5:]))
    content = torch.load(last, weights_only=True)
    keys = ("position", "classes", "model", "training_model", "plugins", "ranks")
    lines = [json.loads(line) for line in (work_dir / "log.jsonl").read_text().splitlines()]
    clock = ("time", "data_time", "memory")
    metrics = [{key: value for key, value in line.items() if key not in clock} for line in lines]
    return {**{key: content[key] for key in keys}, "log": metrics, "last": last.name}


def main(folder: Path, seed: int, kills: int, processes: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    (folder / "backbone.py").write_text(BACKBONE)
    (folder / "config.yaml").write_text(CONFIG)
    train(folder, folder / "warm", 0, "run.until=10 iters")  # imports everything, for all that are forked
    began = time.monotonic()
    assert finish(start(folder, folder / "whole", 1, processes)) == [0] * processes
    whole = time.monotonic() - began
    draw, done, inside, at = random.Random(seed), 0, 0, []
    work_dir, rounds = folder / "killed", 0
    wanted = outcome(folder / "whole")
    wrong: list[str] = []
    while done < kills or rounds == 0:
        pids = start(folder, work_dir, draw.randrange(4), processes)
        if done < kills:
            time.sleep(draw.uniform(0, whole * 0.6))
            if draw.random() < 0.3:  # inside of a save
                deadline = time.monotonic() + 1
                while time.monotonic() < deadline and not any((work_dir / "checkpoints").glob("*.tmp")):
                    pass
            done += 1
            inside += any((work_dir / "checkpoints").glob("*.tmp"))
            kill(pids[:1] if draw.random() < 0.5 else pids)  # of two processes, sometimes only one: the other must end
        ended = finish(pids)
        at.append(max([int(path.stem[5:]) for path in (work_dir / "checkpoints").glob("iter_*.pt")], default=0))
        if ended == [0] * processes:  # it had come to its end: compare, and begin again
            found = outcome(work_dir)
            wrong += [key for key in wanted if not same(wanted[key], found[key])]
            rounds += 1
            shutil.rmtree(work_dir)
    return {"kills": done, "inside": inside, "rounds": rounds, "wrong": sorted(set(wrong)), "at": at}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *map(int, sys.argv[2:]))))
