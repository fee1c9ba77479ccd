"""Several processes: how they find each other, agree to stop, and fail."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported once there is a group, its default arguments would hold that for ever
from detkernel import Run, UserError
from detkernel.errors import follow, printable, relative
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from detkernel_runtime.parallel.hang_watchdog import Watch
from detkernel_runtime.parallel.slurm import TASK

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_runs = itertools.count()
"""One process may run several times (train, then test): each has its own corner of the store."""
_LOST = re.compile(r"gloo/transport|remote process exited|[Cc]onnection (closed|reset) by peer")
"""What torch's back ends say when a process at the other end has gone without a word."""
_BRIEF = timedelta(seconds=5)
"""How long a failing process tries to tell the others."""
_APPEARS = 5.0
"""Seconds after which a file must be seen on the other machines."""


@attrs.frozen
class Places:
    """This process among its peers, as torchrun says in the environment."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    several_machines: bool = False
    own_gpu: bool = False
    """Whether the GPU of a process may be the only one that it sees."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Places:
        """Raises UserError when only some of the variables are there, or they are not numbers."""
        given = os.environ if environment is None else environment
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls()
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        wrong = [name for name in names if not given.get(name, "").isdecimal()]
        if wrong:
            raise UserError(
                f"the environment sets some of {', '.join(names)}, but {' and '.join(wrong)} is not a number: "
                "start several processes with torchrun or `detkernel run --nproc-per-node`, or unset them all"
            )
        rank, local_rank, world_size = (int(given[name]) for name in names)
        here = int(given.get("LOCAL_WORLD_SIZE") or world_size)
        return cls(rank, local_rank, world_size, here < world_size, TASK in given)


@attrs.define(eq=False)
class Group:
    """The process group of a run, and a second one on the CPU over which the processes agree to stop.

    A stop must fall on the same iteration everywhere, or the others wait for a process that has left. So a process
    that wants to stop says so, and all of them do at the end of the iteration after. The question travels while the
    next iteration is computed: nobody waits for it, and no GPU is synchronised.
    """

    _store: Store
    _rank: int
    _control: Any
    watch: Watch
    _own: tuple[str, int] = ("another process stopped", 0)
    _question: Any = None
    _answer: torch.Tensor | None = None

    @classmethod
    def start(cls, run: Run, places: Places, minutes: float) -> Group:
        """Meet the other processes. Raises UserError if they do not come in time."""
        timeout = timedelta(minutes=minutes)
        backend = "nccl" if run.device.type == "cuda" else "gloo"
        try:
            store, rank, world_size = next(rendezvous("env://", timeout=timeout))
            # torchrun keeps its store over a restart, and with it the addresses of processes that are gone
            store = PrefixStore(f"detkernel/{run.launch.restarts}/{world_size}/{next(_runs)}", store)
            device = run.device if backend == "nccl" else None
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
            )
            control = dist.new_group(backend="gloo", timeout=timeout)
        except (dist.DistError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"rank {places.rank}: the {places.world_size} processes did not meet at {where}: {error}"
            ) from None
        watch = Watch(run, store.clone(), minutes * 60)
        watch.start()
        return cls(store, rank, control, watch)

    def summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor: the sum of everybody's, on the CPU."""
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._control)
        return total

    def agree_soon(self, run: Run) -> None:
        """Ask everybody whether to stop, and act on the answer to the question of an iteration ago."""
        self._take_answer(run)
        self._ask(run)

    def agree_now(self, run: Run) -> None:
        """Ask everybody whether to stop, and wait for the answer."""
        self.agree_soon(run)
        self._take_answer(run)

    def fail(self, run: Run, error: BaseException) -> None:
        """Tell the others why this process fails, or learn which one failed first; then leave them."""
        text = f"rank {self._rank} failed in iteration {run.iter}: {type(error).__name__}: {error}"
        try:
            self._store.set_timeout(_BRIEF)
            first = self._store.compare_set("failed", "", text).decode()
        except dist.DistError:
            first = text  # the process that held the store is gone, and its message with it
        if first != text:
            follow(error, first)
        elif _LOST.search(str(error)):
            follow(error, "the connection to another process broke off: it was killed, or its machine is gone")
        self.close(failed=True)

    def close(self, failed: bool = False) -> None:
        """Leave the group; twice is fine."""
        self.watch.stop()
        if dist.is_initialized():
            group = dist.group.WORLD
            if failed and group is not None and dist.get_backend() == "nccl":
                group.abort()  # it would wait for the collectives that the others never join
            dist.destroy_process_group()

    def _ask(self, run: Run) -> None:
        if run.stop_reason is not None:
            self._own = (run.stop_reason, run.exit_status)
            with suppress(dist.DistError):  # the store went with the launcher: each has a reason of its own to stop
                self._store.set("stop", json.dumps(self._own))
        self._answer = torch.tensor([float(run.stop_reason is not None)])
        run.stop_reason, run.exit_status = None, 0
        self._question = dist.all_reduce(self._answer, group=self._control, async_op=True)

    def _take_answer(self, run: Run) -> None:
        if self._question is None or self._answer is None:
            return
        self._question.wait()
        if self._answer.item():
            try:
                reason, status = json.loads(self._store.get("stop"))
            except dist.DistError:
                reason, status = self._own
            run.stop(reason, status)
        self._question = None


def require_shared_work_dir(run: Run) -> None:
    """Raise `UserError` where a process does not see the first one's work dir: it could not read checkpoints there."""
    existed = run.work_dir.is_dir()
    mark = run.processes.from_main(lambda: _marked(run))
    missed = run.processes.gathered(None if _appears(run.work_dir / mark) else socket.gethostname())

    def judge() -> None:
        (run.work_dir / mark).unlink(missing_ok=True)
        if not existed:
            with suppress(OSError):
                run.work_dir.rmdir()
        hosts = sorted({printable(host) for host in missed if host is not None})
        if hosts:
            raise UserError(
                f"run.work_dir: {relative(run.work_dir)} on {printable(socket.gethostname())} is another folder than "
                f"on {', '.join(hosts)}: rank 0 writes checkpoints that all processes read. Give a folder that all "
                "machines share, by the same absolute path"
            )

    run.processes.from_main(judge)


def _marked(run: Run) -> str:
    """Leave a file in the work dir; returns its name."""
    name = f".{uuid.uuid4().hex}"
    try:
        run.work_dir.mkdir(parents=True, exist_ok=True)
        (run.work_dir / name).touch()
    except OSError as error:
        raise UserError(f"run.work_dir: {relative(run.work_dir)} cannot be written: {error.strerror}") from None
    return name


def _appears(path: Path) -> bool:
    until = time.monotonic() + _APPEARS
    while True:
        with suppress(OSError):
            if path.name in os.listdir(path.parent):  # noqa: PTH208 - to open a folder makes NFS look at it afresh
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
