"""The lines: their form, when they are due, and that their metrics are right."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detkernel import Run, hookimpl, option, plugin
from detkernel_detection import Batch, Losses
from detkernel_detection.testing import TinyData, TinyDataset, TinyLoader, tiny_kernel, tiny_run
from detkernel_logging import progress
from detkernel_logging.files import JsonLines, TextLog
from detkernel_logging.log import Log
from detkernel_logging.log_lines import duration

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - detkernel - (INFO|WARNING|ERROR) - "
NUMBER = r"\d+\.\d{4}"


@plugin
class Scripted:
    """Losses as told: iteration 1 gives what `losses[0]` says."""

    losses: list[dict[str, float]] = option(help="name -> value, by iteration")

    @hookimpl
    def build_model(self) -> Any:
        return torch.nn.Linear(1, 1)

    @hookimpl
    def train_step(self, run: Run) -> Losses:
        told = self.losses[run.iter % len(self.losses)]
        return {name: run.model.weight.sum() * 0 + value for name, value in told.items()}

    @hookimpl
    def val_step(self, batch: Batch) -> list[Any]:
        return []


@plugin(priority="high")
class Metrics:
    """What evaluators and the device plugin publish."""

    @hookimpl
    def before_run(self, run: Run) -> None:
        run.scalars |= {"grad_norm": lambda: 3.25, "memory": lambda: 2404.3}

    @hookimpl
    def after_val_epoch(self, run: Run) -> None:
        run.metrics |= {"coco/bbox_mAP": 0.374, "coco/bbox_mAP_50": 0.581, "coco/bbox_mAP_s": math.nan}


def files_only(interval: int = 2) -> Log:
    return Log(interval=interval, sinks=[TextLog(), JsonLines()])


def lines(folder: Path) -> list[str]:
    return (folder / "log.txt").read_text().splitlines()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_training_line_has_mmdetections_form(tmp_path: Path):
    tiny_run({"log": files_only(), "metrics": Metrics()}, until="1 epoch", work_dir=tmp_path)
    line = next(line for line in lines(tmp_path) if "Epoch [1][2/4]" in line)
    assert re.fullmatch(
        STAMP + r"Epoch \[1\]\[2/4\]\tlr: 5\.000e-02, eta: 0:00:0\d, time: \d+\.\d{3}, data_time: \d+\.\d{3}, "
        rf"memory: 2404, loss_cls: {NUMBER}, loss_bbox: {NUMBER}, loss: {NUMBER}, grad_norm: 3\.2500",
        line,
    )


def test_lines_are_counted_in_the_epoch_and_its_end_has_one(tmp_path: Path):
    tiny_run({"log": files_only(3)}, until="2 epochs", work_dir=tmp_path)
    assert re.findall(r"Epoch (\S+)\t", "\n".join(lines(tmp_path))) == ["[1][3/4]", "[1][4/4]", "[2][3/4]", "[2][4/4]"]
    keys = [(entry["epoch"], entry["iter"], entry["step"]) for entry in metrics(tmp_path)]
    assert keys == [(1, 3, 3), (1, 4, 4), (2, 3, 7), (2, 4, 8)]


def test_a_run_in_iterations_counts_over_its_epochs(tmp_path: Path):
    tiny_run({"log": files_only(3)}, until="10 iters", validate="every 5 iters", work_dir=tmp_path)
    heads = re.findall(r"INFO - (Iter.*?)(?:\t|  |$)", "\n".join(lines(tmp_path)), re.MULTILINE)
    assert heads == [
        "Iter [3/10]", "Iter(val) [5][4/4]", "Iter [6/10]", "Iter [9/10]", "Iter [10/10]", "Iter(val) [10][4/4]"
    ]  # fmt: skip
    assert [(e["mode"], e["epoch"], e["iter"], e["step"]) for e in metrics(tmp_path)][:3] == [
        ("train", 1, 3, 3), ("val", 2, 4, 5), ("train", 2, 6, 6)
    ]  # fmt: skip


def test_a_validation_line_has_all_metrics(tmp_path: Path):
    tiny_run({"log": files_only(), "metrics": Metrics()}, until="1 epoch", validate="1 epoch", work_dir=tmp_path)
    line = next(line for line in lines(tmp_path) if "(val)" in line)
    said = "Epoch(val) [1][4/4]  coco/bbox_mAP: 0.3740  coco/bbox_mAP_50: 0.5810  coco/bbox_mAP_s: nan"
    assert re.fullmatch(STAMP + re.escape(said), line)
    assert metrics(tmp_path)[-1] == {
        "mode": "val", "epoch": 1, "iter": 4, "step": 4,
        "coco/bbox_mAP": 0.374, "coco/bbox_mAP_50": 0.581, "coco/bbox_mAP_s": None,
    }  # fmt: skip


def test_a_test_has_a_line_too(tmp_path: Path):
    for _ in range(2):
        tiny_kernel({"log": files_only(), "metrics": Metrics()}, work_dir=tmp_path).test()
    assert "Epoch(test) [4/4]  coco/bbox_mAP: 0.3740" in lines(tmp_path)[-2]
    assert [entry["mode"] for entry in metrics(tmp_path)] == ["test", "test"]


def test_losses_are_means_over_the_interval(tmp_path: Path):
    told = [{"loss_cls": value, "loss_box": 10 * value, "accuracy": value} for value in (1.0, 2.0, 3.0, 7.0, 5.0)]
    tiny_run({"log": files_only(2), "model": Scripted(losses=told)}, until="5 iters", work_dir=tmp_path)
    first, second, last = metrics(tmp_path)
    assert (first["loss_cls"], first["loss_box"], first["accuracy"], first["loss"]) == (1.5, 15.0, 1.5, 16.5)
    assert (second["loss_cls"], second["loss"]) == (5.0, 55.0)
    assert (last["loss_cls"], last["loss"]) == (5.0, 55.0)
    assert list(first)[-4:] == ["loss_cls", "loss_box", "accuracy", "loss"]


def test_a_loss_that_is_not_always_there_is_a_mean_over_where_it_was(tmp_path: Path):
    told = [{"loss_cls": 1.0}, {"loss_cls": 2.0, "loss_mask": 8.0}, {"loss_cls": 6.0}]
    tiny_run({"log": files_only(3), "model": Scripted(losses=told)}, until="3 iters", work_dir=tmp_path)
    (entry,) = metrics(tmp_path)
    assert (entry["loss_cls"], entry["loss_mask"]) == (3.0, 8.0)
    assert entry["loss"] == pytest.approx(17 / 3)


def test_a_loss_named_loss_is_not_counted_twice(tmp_path: Path):
    tiny_run({"log": files_only(), "model": Scripted(losses=[{"loss": 2.0}])}, until="2 iters", work_dir=tmp_path)
    (entry,) = metrics(tmp_path)
    assert entry["loss"] == 2.0
    assert lines(tmp_path)[-2].count("loss") == 1


def test_nan_and_infinity_are_null_in_json(tmp_path: Path):
    told = [{"loss_cls": math.nan, "loss_box": math.inf}]
    tiny_run({"log": files_only(1), "model": Scripted(losses=told)}, until="1 iters", work_dir=tmp_path)
    (entry,) = metrics(tmp_path)
    assert (entry["loss_cls"], entry["loss_box"], entry["loss"]) == (None, None, None)
    assert "loss_cls: nan, loss_box: inf, loss: nan" in lines(tmp_path)[-2]


def test_a_loss_with_the_name_of_a_field_leaves_the_field_alone(tmp_path: Path):
    told = [{"loss": 2.0, "step": 7.0, "mode": 8.0}]
    tiny_run({"log": files_only(), "model": Scripted(losses=told)}, until="2 iters", work_dir=tmp_path)
    (entry,) = metrics(tmp_path)
    assert (entry["mode"], entry["step"]) == ("train", 2)
    assert (entry["train/mode"], entry["train/step"], entry["loss"]) == (8.0, 7.0, 2.0)


def test_a_loss_that_is_no_scalar_is_named(tmp_path: Path):
    @plugin
    class Vector(Scripted):
        """Gives a vector."""

        @hookimpl
        def train_step(self, run: Run) -> Losses:
            return {"loss_cls": run.model.weight.sum() * torch.ones(1)}

    with pytest.raises(TypeError, match=r"a tensor of shape \[1\] as 'loss_cls'; expected a scalar tensor"):
        tiny_run({"log": files_only(), "model": Vector(losses=[])}, work_dir=tmp_path)


def test_losses_in_half_precision_are_summed_in_float32(tmp_path: Path):
    @plugin
    class Half(Scripted):
        """Gives ones in bfloat16, in which no sum gets beyond 256."""

        @hookimpl
        def train_step(self, run: Run) -> Losses:
            return {"loss": (run.model.weight.sum() * 0 + 1).bfloat16()}

    tiny_run({"log": files_only(400), "model": Half(losses=[])}, until="400 iters", work_dir=tmp_path)
    assert metrics(tmp_path)[0]["loss"] == 1.0


def test_an_early_stop_gives_no_line_that_an_undisturbed_run_lacks(tmp_path: Path):
    @plugin
    class Stop:
        """Stops in an interval."""

        @hookimpl
        def after_train_iter(self, run: Run) -> None:
            if run.iter == 3:
                run.stop("enough")

    tiny_run({"log": files_only(2), "stop": Stop()}, until="8 iters", work_dir=tmp_path)
    assert [entry["iter"] for entry in metrics(tmp_path)] == [2]
    assert re.search(r"stopped at iteration 3, after 0:00:0\d: enough$", lines(tmp_path)[-1])


def test_a_run_says_what_it_is_and_how_it_ended(tmp_path: Path):
    tiny_run({"log": files_only(2)}, until="2 iters", validate="2 iters", work_dir=tmp_path)
    first, *_, last = lines(tmp_path)
    assert first.endswith(
        f"work dir {tmp_path}, device cpu, 3 classes, 8 images to train on, 8 images to validate on, "
        "1143 parameters, 1143 of them trained"
    )
    assert re.search(r"done after 0:00:0\d$", last)


class Clock:
    """A clock that only plugins advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class SlowLoader(TinyLoader):
    """Takes a second for the first batch of an epoch and an eighth for each other."""

    clock: Clock

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for number, batch in enumerate(super().batches(epoch, start)):
            self.clock.now += 0.125 if number else 1.0
            yield batch


@plugin
class SlowData(TinyData):
    """Loads slowly."""

    clock: Any = option(help="what it advances")

    @hookimpl
    def build_loader(self, run: Run) -> SlowLoader:
        dataset = TinyDataset()
        dataset.load()
        loader = SlowLoader(dataset, 2, 0, shuffle=False)
        loader.clock = self.clock
        return loader


@plugin(priority="lowest")
class SlowParts:
    """Steps take half a second; checkpoints, validations and other plugins' epochs an hour."""

    clock: Any = option(help="what it advances")

    @hookimpl(tryfirst=True)
    def after_train_iter(self, run: Run) -> None:
        self.clock.now += 0.5

    @hookimpl(trylast=True, specname="after_train_iter")
    def save(self) -> None:
        self.clock.now += 3600

    @hookimpl
    def before_train_epoch(self) -> None:
        self.clock.now += 3600

    @hookimpl
    def after_val_epoch(self) -> None:
        self.clock.now += 3600


def test_validations_and_checkpoints_are_no_part_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    plugins = {"log": files_only(2), "data": SlowData(clock=clock), "slow": SlowParts(clock=clock)}
    tiny_run(plugins, until="2 epochs", validate="every 1 iters", work_dir=tmp_path)
    times = [(entry["time"], entry["data_time"]) for entry in metrics(tmp_path) if entry["mode"] == "train"]
    assert times == [(0.5 + 1.125 / 2, 1.125 / 2), (0.625, 0.125)] * 2
    etas = [line.split("eta: ")[1].split(",")[0] for line in lines(tmp_path) if "eta" in line]
    assert etas == ["0:00:06", "0:00:03", "0:00:02", "0:00:00"]  # 6 x 1.0625, 4 x 0.84375, 2 x 0.917, 0


def test_long_estimates_are_in_days():
    assert duration(200_000) == "2 days, 7:33:20"
