"""Processes that are really killed, at random instants and inside of saves: one final state, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from detkernel import CheckpointError
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_detection.testing import tiny_run

PARTS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from detkernel import Span, hookimpl, option, plugin, state
from detkernel_detection.testing import TinyDetector, tiny_run
from detkernel_checkpoint.checkpoint import Checkpoint

out = Path(sys.argv[1])

@plugin(priority="highest", state_per_rank=True)
class Generators:
    '''What the device plugin does for random numbers.'''
    drawn: list = state(factory=list)

    @hookimpl
    def before_run(self, run):
        torch.manual_seed(run.seed + run.rank)

    @hookimpl(trylast=True)
    def before_train_iter(self, run):
        self.drawn.append((run.iter, torch.rand(()).item()))

    def state_dict(self):
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state):
        torch.set_rng_state(state["torch"])
"""

KILLS = """
@plugin
class Wide(TinyDetector):
    '''A detector with weights that take a while to write, and steps that take a while.'''

    @hookimpl
    def build_model(self, run):
        model = super().build_model(run)
        model.register_buffer("ballast", torch.zeros(500_000))
        return model

    @hookimpl
    def train_step(self, run, model, batch):
        time.sleep(0.002)
        run.model.ballast += torch.rand(())
        return super().train_step(run, model, batch)

def train(folder):
    plugins = {"generators": Generators(), "model": Wide(), "checkpoint": Checkpoint(every=Span(1, "iters"), keep=3)}
    return tiny_run(plugins, until="10 epochs", validate="7 iters", work_dir=folder)

def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def child(folder):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            train(folder)
            status = 0
        finally:
            os._exit(status)
    return pid

torch.set_num_threads(1)
train(out / "warm")
start = time.monotonic()
train(out / "whole")
whole = time.monotonic() - start
draw, kills, inside, resumed = random.Random(int(sys.argv[2])), 0, 0, []
folder = out / "killed" / "checkpoints"
while kills < int(sys.argv[3]):
    pid = child(out / "killed")
    time.sleep(draw.uniform(0, whole / 2))
    if draw.random() < 0.5:
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and not any(folder.glob("*.tmp")):
            pass
    os.kill(pid, signal.SIGKILL)
    ended = os.waitpid(pid, 0)[1]
    if not os.WIFSIGNALED(ended):  # it was done: begin again
        assert ended == 0, ended
        shutil.rmtree(folder)
        continue
    kills += 1
    inside += any(folder.glob("*.tmp"))
    resumed.append(max([int(path.stem[5:]) for path in folder.glob("iter_*.pt")], default=0))
assert os.waitpid(child(out / "killed"), 0)[1] == 0
last = [out / side / "checkpoints" / "iter_40.pt" for side in ("whole", "killed")]
first, second = (torch.load(path, weights_only=True) for path in last)
report = {key: same(first[key], second[key]) for key in ("position", "model", "plugins", "ranks")}
print(json.dumps({"same": report, "kills": kills, "inside": inside, "resumed": resumed}))
"""


def python(tmp_path: Path, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(PARTS + textwrap.dedent(body))
    return subprocess.run(
        [sys.executable, str(script), str(tmp_path), *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by forking")
def test_killed_runs_end_where_the_undisturbed_one_does(tmp_path: Path):
    done = python(tmp_path, KILLS, "0", "16")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["same"] == {"position": True, "model": True, "plugins": True, "ranks": True}
    assert said["kills"] == 16
    assert said["inside"] >= 2
    assert len(set(said["resumed"])) >= 4


RANKS = """
import torch._dynamo  # once for both processes
import torch.distributed as dist
import torch.distributed.nn  # later, its default arguments would hold the group, and its threads abort the process
from detkernel import UserError
from detkernel_detection.processes import TorchProcesses

@plugin(priority="highest")
class Gloo:
    '''Two processes that train side by side.'''

    @hookimpl
    def setup(self, run):
        if not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=int(child == 0), world_size=2)
        run.rank, run.world_size = dist.get_rank(), dist.get_world_size()
        run.processes = TorchProcesses()

@plugin(resume_neutral=("*",))
class Stop:
    '''Stops early.'''
    at: int = option(help="iteration")

    @hookimpl
    def after_train_iter(self, run):
        if run.iter == self.at:
            run.stop("enough")

def train(folder, at, **options):
    parts = {"gloo": Gloo(), "generators": Generators(), "checkpoint": Checkpoint(**options), "stop": Stop(at=at)}
    tiny_run(parts, until="6 iters", work_dir=out / folder)
    return parts["generators"].drawn

child = os.fork()
whole = train("whole", 99)
before, after = train("resumed", 3), train("resumed", 99)
try:
    train("broken", 3, resume=str(out / "none.pt"))
except UserError as error:
    said = str(error)
report = {"exact": whole == before + after, "after": len(after), "first": whole[0], "said": said}
(out / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
dist.destroy_process_group()
assert child == 0 or os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by forking")
def test_every_process_goes_on_with_its_own_random_numbers(tmp_path: Path):
    done = python(tmp_path, RANKS)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["exact"] for rank in ranks] == [True, True]
    assert [rank["after"] for rank in ranks] == [3, 3]
    assert ranks[0]["first"] != ranks[1]["first"]
    assert all("none.pt', and no such file" in rank["said"] for rank in ranks)
    with pytest.raises(CheckpointError, match="processes: 2 -> 1"):
        tiny_run({"checkpoint": Checkpoint()}, until="6 iters", work_dir=tmp_path / "resumed")
