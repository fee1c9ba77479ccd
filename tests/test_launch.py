"""Several processes of one run, as `detkernel run --nproc-per-node` starts them: how they end, and what is told."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from .conftest import long

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo over localhost, as on Linux")

CONFIG = """
run: {until: 40 iters, work_dir: work}
device: {threads: 1, timeout: 1, device: cpu}
data: {use: loader, train: {use: ./hooks.py:TinyDataset, size: 16}, batch_size: 2, workers: 0}
model: {use: ./hooks.py:Frozen}
checkpoint: {every: 2 iters}
log: {}
signals: {}
"""
TRAINED = ("model.use=./hooks.py:TinyDetector", "optimizer={use: adamw, lr: 1e-3}")
WRONG = ("model=torchvision_fcos", "data.train={use: shapes, bach_size: 3}")
HOOKS = '''
import os, signal, time
from pathlib import Path
import torch
from detkernel import UserError, hookimpl, option, plugin
from detkernel_detection.testing import TinyDataset, TinyDetector

@plugin
class Frozen(TinyDetector):
    """Trains nothing: torch takes two seconds in each process to import what a trained model is wrapped in."""

    @hookimpl
    def build_model(self, run):
        return super().build_model(run).requires_grad_(False)

    @hookimpl
    def after_train_iter(self, run, losses):
        """Waits for the other process, as that wrapper does."""
        if run.world_size > 1:
            torch.distributed.all_reduce(sum(losses.values()))

@plugin(resume_neutral=("*",))
class Act:
    """Does something in one process, at one iteration."""
    what: str = option(help="what")
    then: str = option(default="nothing", help="what to do at the next time, after a restart")

    @hookimpl
    def before_train_iter(self, run):
        if run.iter == 5:
            Path(f"reached-{run.rank}").touch()
            if run.rank == 1:
                again = Path("done").exists()
                Path("done").touch()
                getattr(self, self.then if again else self.what)(run)

    def bug(self, run):
        raise OSError("the lights went out")

    def mistake(self, run):
        raise UserError("this one is yours")

    def die(self, run):
        os.kill(os.getpid(), signal.SIGKILL)

    def nothing(self, run):
        pass

    @hookimpl(specname="after_train_iter")
    def linger(self, run):
        time.sleep(0.1 if self.what == "nothing" else 0)

@plugin
class Deaf:
    """Hears no signal."""

    @hookimpl
    def before_train_iter(self, run):
        if run.iter == 5:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            Path(f"reached-{run.rank}").touch()
            time.sleep(100)
'''
LONG = "DETKERNEL_LONG" in os.environ
RUN = (sys.executable, "-m", "detkernel", "run", "config.yaml", "act.use=./hooks.py:Act")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "hooks.py").write_text(HOOKS)


def start(folder: Path, *arguments: str, command: tuple[str, ...] = RUN, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "NO_COLOR": "1", **environment}
    environment.pop("LOCAL_RANK", None)
    return subprocess.Popen(
        [*command, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, told = process.communicate(timeout=200)
    return process.returncode, told


def reach(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until both processes are at iteration 5."""
    while not all((folder / f"reached-{rank}").exists() for rank in range(2)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def weights(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    content = torch.load(folder / f"work/checkpoints/iter_{iteration}.pt", weights_only=True)
    return dict(content["model"])


def test_a_killed_process_takes_the_run_down_and_a_restart_goes_on(tmp_path: Path) -> None:
    """To its end, or to a mistake, which is told once and not tried again."""
    two = ("--nproc-per-node", "2", "run.until=8 iters")
    end_of_it = "nothing" if LONG else "mistake"
    starting = (*two, "act.what=die", "--max-restarts", "3", f"act.then={end_of_it}", "checkpoint.resume=never")
    status, told = end(start(tmp_path, *starting, *(TRAINED if LONG else ())))
    assert status == (0 if LONG else 2), told
    said = "rank 1 was killed by SIGKILL; the system does that when memory runs out (see `dmesg`)"
    assert f"\n{said}\nstarting again, 1 of 3\n" in told
    assert told.count("starting again") == 1
    assert "Traceback" not in told
    assert "gloo" not in told
    assert "going on from work/checkpoints/iter_4.pt" in told
    if LONG:
        bit_for_bit(tmp_path, *two, *TRAINED)
    else:
        assert "\nerror: this one is yours\nTo go on from work/checkpoints/iter_" in told


def bit_for_bit(tmp_path: Path, *two: str) -> None:
    """What was killed is what a run that nothing disturbs is; of two processes, plugins/checkpoint tests it too."""
    status, told = end(start(tmp_path, *two, "act.what=nothing", "run.work_dir=whole"))
    assert status == 0, told
    (tmp_path / "whole").rename(tmp_path / "other")
    (tmp_path / "other/work").symlink_to(".")
    once, twice = weights(tmp_path / "other", 8), weights(tmp_path, 8)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_the_process_that_failed_first_is_the_one_that_is_told(tmp_path: Path) -> None:
    status, told = end(start(tmp_path, "--nproc-per-node", "2", "act.what=bug"))
    assert status == 1
    assert told.count("Traceback") == 1
    assert told.count("raised in plugin 'act'") == 1
    error, hint = told.splitlines()[-2:]
    assert error.startswith("raised in plugin 'act'")
    assert hint.startswith("To go on from work/checkpoints/iter_")
    assert "\nrank 1:\nTraceback" in told
    assert ": rank 1 failed in iteration 5: OSError: the lights went out" in told  # rank 0's log
    assert "gloo" not in told


def test_a_mistake_in_the_config_is_told_once(tmp_path: Path) -> None:
    several = end(start(tmp_path, "--nproc-per-node", "2", *WRONG, command=RUN[:5]))
    assert several == (2, end(start(tmp_path, *WRONG, command=RUN[:5]))[1])


def test_a_signal_stops_all_processes_and_saves(tmp_path: Path) -> None:
    process = start(tmp_path, "--nproc-per-node", "2", "act.what=nothing", "checkpoint.every=null")
    reach(tmp_path, process)
    process.send_signal(signal.SIGUSR1)
    status, told = end(process)
    assert status == 75, told
    assert told.count("SIGUSR1: stopping after this iteration") == 1
    stopped = int(told.split("stopped at iteration ")[1].split(",")[0])
    assert 5 < stopped < 40
    assert [path.name for path in (tmp_path / "work/checkpoints").glob("iter_*.pt")] == [f"iter_{stopped}.pt"]


@long
def test_a_second_interrupt_leaves_at_once_even_processes_that_hear_none(tmp_path: Path) -> None:
    process = start(tmp_path, "--nproc-per-node", "2", "act.what=nothing", "deaf.use=./hooks.py:Deaf")
    reach(tmp_path, process)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 60:  # to the last moment, when Python shuts down
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    status, told = end(process)
    assert time.monotonic() - began < 60
    assert status == 130, told
    assert (tmp_path / "work/checkpoints/iter_4.pt").exists()


@long
def test_torchrun_restarts_alike_and_tells_the_cause(tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1")
    status, told = end(start(tmp_path, "act.what=bug", "act.then=bug", command=(*torchrun, *RUN[1:])))
    assert status == 1, told
    assert "going on from work/checkpoints/iter_4.pt" in told
    summary = told[told.index("Root Cause") :]
    assert "OSError: the lights went out" in summary


@long
def test_a_machine_that_cannot_resolve_its_own_name_runs_several_processes(tmp_path: Path) -> None:
    nowhere = ("unshare", "--uts", "sh", "-c", 'hostname nowhere.invalid && exec "$@"', "sh")
    if not shutil.which("unshare") or subprocess.run([*nowhere, "true"], capture_output=True).returncode:
        pytest.skip("to give a process another host name needs root, on Linux")
    options = ("--nproc-per-node", "2", "act.what=nothing", "run.until=2 iters")
    status, told = end(start(tmp_path, *options, command=(*nowhere, *RUN)))
    assert status == 0, told
    assert "device cpu, 2 processes" in told


def listening(processes: set[int]) -> set[str]:
    """The addresses, in hexadecimal, on which any of these processes listens."""
    inodes = set()
    for process in processes:
        with suppress(FileNotFoundError):  # it has ended meanwhile
            for entry in Path(f"/proc/{process}/fd").iterdir():
                with suppress(FileNotFoundError):
                    inodes.add(str(entry.readlink()))
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def descendants(process: int) -> set[int]:
    found = {process}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            child, parent = int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == process:
                found |= descendants(child)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nobody_else_can_take_part_and_a_killed_launcher_takes_its_processes_along(tmp_path: Path) -> None:
    """Sockets on the loopback interface only, no module from the current folder, and no process that stays behind."""
    for module in ("torch", "pickle", "attrs", "detkernel_data"):
        (tmp_path / f"{module}.py").write_text("from pathlib import Path; Path('shadowed').touch(); raise ImportError")
    command = (str(Path(sys.executable).with_name("detkernel")), *RUN[3:])
    process = start(tmp_path, "--nproc-per-node", "2", "act.what=nothing", "run.until=900 iters", command=command)
    reach(tmp_path, process)
    family = descendants(process.pid)
    assert len(family) == 3
    assert listening(family) == {"0100007F"}, "127.0.0.1, in the byte order of /proc on such a machine"
    process.kill()
    status, told = end(process)  # once all have closed their ends of the pipes
    assert status == -signal.SIGKILL
    assert "stopped at iteration" in told, told
    assert len(list((tmp_path / "work/checkpoints").glob("*.pt"))) > 0
    assert not (tmp_path / "shadowed").exists()


@pytest.mark.parametrize(
    "command", [RUN[:3], (str(Path(sys.executable).with_name("detkernel")),)], ids=["-m", "script"]
)
def test_the_current_folder_shadows_no_module(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not this one')")
    (tmp_path / "detkernel_data.py").write_text("raise ImportError('not this one')")
    status, told = end(start(tmp_path, "config", "config.yaml", *WRONG, command=command))
    assert (status, told.count("there is no option 'bach_size'")) == (2, 1), told


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@long
def test_two_machines_restart_together_and_each_tells_the_cause_once(tmp_path: Path) -> None:
    where = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    options = ("act.what=die", "--max-restarts", "1", "checkpoint.resume=never", "run.until=8 iters")
    machines = [start(tmp_path, *where, *options) for _ in range(2)]
    reach(tmp_path, machines[0])
    assert listening(descendants(os.getpid())) <= {"0100007F"}, "an address on the loopback interface is all of it"
    for status, told in map(end, machines):
        assert status == 0, told
        assert told.count("rank 1 was killed by SIGKILL") == 1
        assert told.count("on machine 1 (") == told.count("\nstarting again, 1 of 1\n") == 1
        assert "Traceback" not in told
        assert "[c10d]" not in told
    assert weights(tmp_path, 8)


def test_tasks_of_slurm_are_the_processes_of_a_run(tmp_path: Path) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost,n2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    step |= {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "MASTER_PORT": str(free_port())}
    tasks = [
        start(tmp_path, "act.what=bug", "run.until=8 iters", SLURM_PROCID=str(rank), SLURM_NODEID=str(rank), **step)
        for rank in range(2)
    ]
    (status, first), (other, told) = map(end, tasks)
    assert (status, other) == (1, 1)
    assert "device cpu, 2 processes" in first
    assert f"Slurm: listening on 127.0.0.1:{step['MASTER_PORT']} for 2 tasks" in first
    assert "OSError: the lights went out" in told
    assert "rank 1 failed in iteration 5: OSError: the lights went out" in first
