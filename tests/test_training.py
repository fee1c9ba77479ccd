"""The main job, as a user runs it: train, look, go on, test, on one process and on two."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from .conftest import Detkernel, Warm, long

CONFIG = """
run: {until: 12 iters, validate: every 6 iters, work_dir: work}
device: {threads: 1}
data:
  use: loader
  train: {use: shapes, size: 24, side: 64, sizes: [12, 40]}
  val: {use: shapes, size: 7, side: 64, sizes: [12, 40], split: val}
  train_transforms: [flip, color]
  batch_size: 2
  workers: 1
model:
  {use: torchvision_fcos, backbone: {use: mobilenet_v3, size: small, layers: [3, 8]}, neck_channels: 64, head_convs: 1}
optimizer: {use: adamw, lr: 1e-3}
schedule: {use: cosine, warmup: 4 iters}
ema: {}
evaluation: {use: coco_map}
log: {interval: 3}
checkpoint: {every: 3 iters, best: coco/bbox_mAP}
draw_predictions: {score: 0}
signals: {}
check_invalid_loss: {}
check_classes: {}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, python: Warm) -> Path:
    """A folder with a config and the run that it gave."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "config.yaml").write_text(CONFIG)
    result = python("-m", "detkernel", "run", "config.yaml", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def lines(folder: Path) -> list[dict[str, object]]:
    """The metrics of a run, less those of the clock."""
    found = [json.loads(line) for line in (folder / "work/log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "data_time", "memory")} for line in found]


def test_a_run_leaves_what_the_readme_says(trained: Path) -> None:
    work = trained / "work"
    log = (work / "log.txt").read_text()
    assert "Iter [12/12]\tlr: " in log
    assert "coco/bbox_mAP_50: " in log
    assert [line["step"] for line in lines(trained) if line["mode"] == "train"] == [3, 6, 9, 12]
    assert [line["step"] for line in lines(trained) if line["mode"] == "val"] == [6, 12]
    assert {path.name for path in (work / "checkpoints").glob("iter_*.pt")} == {f"iter_{n}.pt" for n in (3, 6, 9, 12)}
    assert list((work / "checkpoints").glob("best_*.pt"))
    assert {path.name for path in (work / "predictions").iterdir()} == {
        *("iter_6.jpg", "iter_12.jpg", "train_samples.jpg", "curves.png")
    }
    with Image.open(work / "predictions" / "iter_12.jpg") as image:
        assert image.width > 500
    assert "# detkernel-kernel" in (work / "config.yaml").read_text()


def test_the_written_config_gives_the_same_run(trained: Path, tmp_path: Path, detkernel: Detkernel) -> None:
    (tmp_path / "again.yaml").write_text((trained / "work/config.yaml").read_text())
    result = detkernel("run", "again.yaml")
    assert result.returncode == 0, result.stderr
    assert lines(tmp_path) == lines(trained)


def test_a_checkpoint_is_tested_and_gone_on_from_without_another_file(
    trained: Path, tmp_path: Path, detkernel: Detkernel
) -> None:
    last, middle = (trained / f"work/checkpoints/iter_{number}.pt" for number in (12, 6))
    result = detkernel("test", last, "run.work_dir=tested")
    assert result.returncode == 0, result.stderr
    assert f"tensors from {last}" in result.stderr
    [told] = [line for line in lines(trained) if line["mode"] == "val" and line["step"] == 12]
    assert f"coco/bbox_mAP_50: {told['coco/bbox_mAP_50']:.4f}" in result.stdout
    result = detkernel("run", middle, "run.work_dir=work")
    assert result.returncode == 0, result.stderr
    ends = [torch.load(folder / "work/checkpoints/iter_12.pt", weights_only=True) for folder in (trained, tmp_path)]
    assert all(torch.equal(value, ends[1]["model"][name]) for name, value in ends[0]["model"].items())


def test_a_terminated_run_goes_on_where_it_was(trained: Path, tmp_path: Path, detkernel: Detkernel) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "detkernel", "run", "config.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = tmp_path / "work/log.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 1):
        assert process.poll() is None
        time.sleep(0.01)
    while process.poll() is None:  # to the last moment, when Python shuts down
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.communicate(timeout=120)
    assert process.returncode in (75, 0)  # 0: it was at its end already
    result = detkernel("run", "config.yaml")
    assert result.returncode == 0, result.stderr
    assert lines(tmp_path) == lines(trained)


@long  # evaluators by themselves: plugins/evaluation tests them on two processes
def test_metrics_on_two_processes_equal_those_on_one(trained: Path, tmp_path: Path, detkernel: Detkernel) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    found = []
    for number, more in enumerate(([], ["--nproc-per-node", "2"])):
        weights = trained / "work/checkpoints/iter_12.pt"
        work = f"run.work_dir=test{number}"
        result = detkernel(
            "test", *more, "config.yaml", f"checkpoint.load_from={weights}", work, "data.val_batch_size=1"
        )
        assert result.returncode == 0, result.stderr
        metrics = [json.loads(line) for line in (tmp_path / f"test{number}/log.jsonl").read_text().splitlines()]
        found.append({key: value for key, value in metrics[-1].items() if key.startswith("coco/")})
    assert found[0] == found[1]
    assert found[0]["coco/bbox_mAP"] is not None
