"""Two processes: one log, with the losses of both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from detkernel import declared
from detkernel_logging.log import Log

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
import torch.distributed.nn  # later, its default arguments would hold the group, and its threads abort the process
from detkernel import hookimpl, option, plugin
from detkernel_detection.processes import TorchProcesses
from detkernel_detection.testing import tiny_run
from detkernel_logging.log import Log

@plugin(priority="highest")
class Ranks:
    '''What the device plugin does.'''

    @hookimpl
    def setup(self, run):
        run.rank, run.world_size = int(os.environ["RANK"]), 2
        store = f"file://{os.environ['STORE']}"
        dist.init_process_group("gloo", init_method=store, rank=run.rank, world_size=2)
        run.processes = TorchProcesses()
        run.log.info("rank %d is here", run.rank)

    @hookimpl(trylast=True)
    def after_run(self):
        dist.destroy_process_group()

@plugin
class Model:
    '''Losses that tell the processes apart; the second one has a loss of its own in the first iteration.'''
    @hookimpl
    def build_model(self):
        return torch.nn.Linear(1, 1)

    @hookimpl
    def train_step(self, run):
        zero = run.model.weight.sum() * 0
        losses = {"loss_cls": zero + 10 * run.rank + run.iter}
        return losses | {"loss_mask": zero + 8} if run.rank and not run.iter else losses

    @hookimpl
    def val_step(self):
        return []

@plugin
class Stop:
    '''One of the processes wants to stop; the other does not know yet. It stands in for an optimizer, which takes torch
    seconds to import.'''
    @hookimpl
    def after_train_iter(self, run):
        if run.rank == 1 and run.iter == 4:
            run.log.warning("trouble on rank %d", run.rank)
        if run.iter == 5:
            run.stop("enough")

@plugin(priority="lowest")
class Keep:
    '''Keeps the state in the middle of an interval, each process its own, or starts from it.'''
    resume: bool = option(default=False, help="start from it")

    @hookimpl(trylast=True)
    def before_run(self, run):
        if self.resume:
            run.load_state_dict(kept["position"])
            run.bus["log"].load_state_dict(kept["log"])

    @hookimpl
    def after_train_iter(self, run):
        if run.iter == 3:
            kept.update(position=run.state_dict(), log=run.bus["log"].state_dict())

def train(name, resume):
    plugins = {"ranks": Ranks(), "model": Model(), "optimizer": Stop(), "keep": Keep(resume=resume)}
    plugins["log"] = Log(interval=2)
    tiny_run(plugins, until="6 iters", validate="4 iters", work_dir=f"{sys.argv[1]}/{name}{os.environ['RANK']}")

kept = {}
train("rank", resume=False)
os.environ["STORE"] += "2"
train("resumed", resume=True)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder, and what each process wrote to standard error."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(script), str(folder)],
            stderr=subprocess.PIPE, text=True, env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "".join(said)
    return folder, said


def test_losses_are_means_over_the_processes(ranks: tuple[Path, list[str]]):
    entries = [json.loads(line) for line in (ranks[0] / "rank0/log.jsonl").read_text().splitlines()]
    first, second, val = entries
    assert first["loss_cls"] == 5.5  # 0 and 1 on the first process, 10 and 11 on the second
    assert first["loss_mask"] == 8.0
    assert first["loss"] == 7.5  # the sum of each of the four iterations, on average
    assert (second["loss_cls"], second["loss"]) == (7.5, 7.5)
    assert val["mode"] == "val"
    resumed, *_ = (json.loads(line) for line in (ranks[0] / "resumed0/log.jsonl").read_text().splitlines())
    assert (resumed["step"], resumed["loss"]) == (4, 7.5)
    assert declared(Log).state_per_rank


def test_only_the_first_process_writes(ranks: tuple[Path, list[str]]):
    folder, (first, second) = ranks
    assert not (folder / "rank1").exists()
    assert "Iter [2/6]" in first
    assert "device cpu, 2 processes" in first
    assert "rank 0 is here" in first
    said = [line.split(" - ", 1)[1] for line in second.splitlines()]
    assert said == ["detkernel - WARNING - trouble on rank 1"] * 2
