"""A run that was killed and resumed has the log of one that nothing disturbed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from detkernel import Run, hookimpl, option, plugin, state
from detkernel_detection.testing import HookContract, tiny_kernel
from detkernel_logging.files import JsonLines, TextLog
from detkernel_logging.log import Log

ITERS = 11


@plugin(priority="lowest")
class Keep:
    """Keeps every state, as the checkpoint plugin would save it, and starts from one."""

    resume: Any = option(default=None, help="the state to start from")
    kept: dict[int, dict[str, Any]] = state(factory=dict)

    @hookimpl(trylast=True)
    def before_run(self, run: Run) -> None:
        if self.resume is not None:
            kept = copy.deepcopy(self.resume)
            run.load_state_dict(kept["position"])
            run.model.load_state_dict(kept["model"])
            for name, part in run.bus.stateful():
                part.load_state_dict(kept["plugins"][name])
            torch.set_rng_state(kept["noise"])

    @hookimpl
    def after_train_iter(self, run: Run) -> None:
        plugins = {name: part.state_dict() for name, part in run.bus.stateful()}
        self.kept[run.iter] = copy.deepcopy(
            {"position": run.state_dict(), "model": run.model.state_dict(), "plugins": plugins}
        ) | {"noise": torch.get_rng_state()}

    @hookimpl(tryfirst=True)
    def after_val_epoch(self, run: Run) -> None:
        run.metrics["coco/bbox_mAP"] = float(run.model[-1].weight.detach().sum())


def train(folder: Path, resume: Any = None, until: str = f"{ITERS} iters") -> Keep:
    torch.manual_seed(0)
    keep = Keep(resume=resume)
    log = Log(interval=3, sinks=[TextLog(), JsonLines()])
    tiny_kernel({"log": log, "keep": keep}, until=until, validate="every 4 iters", work_dir=folder).run()
    return keep


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The JSON lines without what a clock decides; `==` on their floats is bit for bit."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if not key.endswith("time")} for entry in entries]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keep]:
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(folder)


@pytest.mark.parametrize("position", range(1, ITERS))
def test_wherever_a_run_is_resumed_its_log_is_that_of_an_undisturbed_one(
    position: int, straight: tuple[Path, Keep], tmp_path: Path
):
    folder, keep = straight
    assert [entry["step"] for entry in timeless(folder)] == [3, 4, 6, 8, 9, 11, 11]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)  # it was killed when it had written everything
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"mode": "train", "epo')
    train(tmp_path, keep.kept[position])
    assert timeless(tmp_path) == timeless(folder)
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith((folder / "log.txt").read_text())
    assert text.count("work dir") == 2


def test_epochs_are_resumed_too(tmp_path: Path):
    keep = train(tmp_path / "a", until="3 epochs")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train(tmp_path / "b", keep.kept[6], until="3 epochs")
    assert timeless(tmp_path / "b") == timeless(tmp_path / "a")
    assert [entry["iter"] for entry in timeless(tmp_path / "b")] == [3, 4, 4] * 3


def test_the_log_of_another_run_is_kept_under_another_name(tmp_path: Path):
    for _ in range(3):
        train(tmp_path)
    first, second, third = (tmp_path / name for name in ("log_1.jsonl", "log_2.jsonl", "log.jsonl"))
    assert len(first.read_text().splitlines()) == len(third.read_text().splitlines()) == 7
    assert second.exists()
    assert "log.jsonl of an earlier run is now log_2.jsonl" in (tmp_path / "log.txt").read_text()


def test_a_test_leaves_the_lines_of_the_training_alone(tmp_path: Path):
    train(tmp_path)
    tiny_kernel({"log": Log()}, work_dir=tmp_path).test()
    assert [entry["mode"] for entry in timeless(tmp_path)][-2:] == ["val", "test"]
    assert len(timeless(tmp_path)) == 8


class TestLogContract(HookContract):
    name = "log"

    def plugin(self) -> Log:
        return Log(interval=4, sinks=[])
