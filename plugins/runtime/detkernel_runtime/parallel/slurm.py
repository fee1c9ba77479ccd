"""Under Slurm's `srun`, every task is a process of the run, or with `--nproc-per-node`, a machine of it: Slurm's
variables say what torchrun's options would."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import attrs
import click
from detkernel.errors import UserError

from detkernel_runtime.parallel import machines
from detkernel_runtime.parallel.machines import Plan

TASK = "DETKERNEL_TASK"
"""Set in a process that takes part in a run as a task of Slurm's."""
_PORTS = range(20000, 32000)
"""Below those that Linux hands out to connections."""

_store: Any = None
"""Where the processes meet; on the first of them, which holds it as long as it lives."""


@attrs.frozen
class Task:
    """A task of a step (`srun`), as its environment says. A batch script by itself is not one."""

    rank: int
    count: int
    local_rank: int
    local_count: int
    host: str
    """Where the first task is."""
    port: int
    identity: str
    restarts: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Task | None:
        """None where there is one task, or no step. Raises `UserError` for variables that do not go together."""
        given = os.environ if environment is None else environment
        if int(_number(given, "SLURM_STEP_NUM_TASKS", "1")) == 1 or "RANK" in given or "WORLD_SIZE" in given:
            return None
        rank, count = _number(given, "SLURM_PROCID"), _number(given, "SLURM_STEP_NUM_TASKS")
        job, step = _number(given, "SLURM_JOB_ID"), _number(given, "SLURM_STEP_ID", "0")
        nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_NODELIST") or ""
        host = given.get("MASTER_ADDR") or _first(nodes)
        if not host:
            raise UserError("Slurm: SLURM_STEP_NODELIST names no machine; set MASTER_ADDR to the first one's address")
        port = int(_number(given, "MASTER_PORT", str(_PORTS[(job * 31 + step) % len(_PORTS)])))
        tasks = given.get("SLURM_STEP_TASKS_PER_NODE") or str(count)
        local = _per_node(tasks, _number(given, "SLURM_NODEID", "0"))
        identity, restarts = f"slurm {job}.{step}", _number(given, "SLURM_RESTART_COUNT", "0")
        return cls(rank, count, _number(given, "SLURM_LOCALID"), local, host, port, identity, restarts)


def _number(given: Mapping[str, str], name: str, default: str = "") -> int:
    value = given.get(name, default)
    if not value.isdecimal():
        raise UserError(
            f"Slurm: the environment has SLURM_STEP_NUM_TASKS, but {name} is {value or 'missing'!r}; start the run "
            "with `srun detkernel run ...`, or give --nnodes 1 for a run of this task alone"
        )
    return int(value)


def _first(nodes: str) -> str:
    """Of `gpu[003-005,008],login1`: gpu003."""
    plain = re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes)
    return plain.partition(",")[0]


def _per_node(tasks: str, node: int) -> int:
    """How many tasks the machine has, of `2(x3),1`: 2, 2, 2, 1."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(times or 1)
    return counts[node] if node < len(counts) else counts[-1]


def take_part() -> None:
    """Make this process one of the run, if it is a task of several.

    Raises `UserError` where the first cannot listen.
    """
    task = Task.from_environment()
    if task is None:
        return
    plan = Plan(task.count, task.host, task.port, task.rank)
    address = machines.resolved(plan)
    _hold(plan, address)
    os.environ |= {
        **{"RANK": str(task.rank), "WORLD_SIZE": str(task.count), "MASTER_ADDR": address},
        **{"LOCAL_RANK": str(task.local_rank), "LOCAL_WORLD_SIZE": str(task.local_count)},
        **{"MASTER_PORT": str(task.port), TASK: "1"},
        **{"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"},
        **{"DETKERNEL_RUN": task.identity, "DETKERNEL_RESTARTS": str(task.restarts)},
    }
    if task.local_count > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    name = machines.interface(address, task.port)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _hold(plan: Plan, address: str) -> None:
    """On the first task, open the store in which all of them meet; torch's own would listen on every interface."""
    global _store
    opened = machines.listening(plan, address)
    if opened is not None:
        click.echo(
            f"Slurm: listening on {address}:{plan.port} for {plan.count} tasks; whoever reaches that can run code here",
            err=True,
        )
        _store = machines.serve(address, plan.port, opened)


def plan(restarts: int) -> Plan | None:
    """The machines of a launch with `--nproc-per-node`, if there is a task of Slurm's on each."""
    task = Task.from_environment()
    return None if task is None else Plan(task.count, task.host, task.port, task.rank, restarts=restarts)
