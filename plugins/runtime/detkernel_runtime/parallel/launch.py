"""`--nproc-per-node`: several processes of one run, here and on other machines (`machines.py`). torch's elastic agent
starts them, what fails is told once. Nothing of torch is imported until then: `detkernel run --help` imports this.

The agent is the one under torchrun. What is added to it are the ends of a run: a signal reaches every process, which
then finishes its iteration and saves; the process that failed first is the one whose error is shown; and the exit
status is the run's own.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

import attrs
import click
from detkernel.errors import ResourceError, UserError, followed
from detkernel.files import write_atomic
from detkernel.processes import Launch

from detkernel_runtime.parallel import machines, slurm
from detkernel_runtime.parallel.machines import Meeting, Plan

_REPORTS = "DETKERNEL_REPORTS"
"""The folder where the processes of a launch leave word of how they ended."""
_RESTARTS = "DETKERNEL_RESTARTS"
_IDENTITY = "DETKERNEL_RUN"
_LAUNCHER = "DETKERNEL_LAUNCHER"
"""The launcher's process id."""
_PASSED_ON = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT")
_SIGKILL = 9
_CRASHES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE")
"""What ends a process from outside or below: no error of another process leads to it."""
_AT_ONCE = 5.0
"""Seconds until a second Ctrl-C kills what does not leave: a process that waits for others hears no signal."""
_POLL = 0.05
_LOOK = 1.0
"""Seconds between two looks at whether the launcher is still there."""
_GRACE = 60.0
"""Seconds that a process without its launcher has to save."""


@attrs.frozen
class Report:
    """How one process ended, where that was not well: its exit status, and what it would have printed."""

    rank: int
    status: int
    text: str = ""
    follows: bool = False
    """It failed only because another process did."""
    final: bool = False
    """Starting again would help nothing: it was told to stop, or the user has something to fix."""


def is_rank() -> bool:
    """Whether this is one of the processes that a launcher (this one, or torchrun) has started."""
    return "LOCAL_RANK" in os.environ


def launched() -> Launch:
    """How this process was started, by this launcher or by torchrun."""
    restarts = max(int(os.environ.get(name) or 0) for name in (_RESTARTS, "TORCHELASTIC_RESTART_COUNT"))
    named = os.environ.get("TORCHELASTIC_RUN_ID") or ""
    if named == "none":  # torchrun's word for no name: its own process stands for it
        named = f"torchrun {os.getppid()}"
    return Launch(restarts, os.environ.get(_IDENTITY) or named)


def report(status: int, error: BaseException | None = None, text: str = "") -> bool:
    """Leave word of how this process ends. False where nobody reads it: then the process prints it itself.

    Under torchrun it is reported as well, in the file from which torchrun takes the message of its summary.
    """
    folder, file = os.environ.get(_REPORTS), os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        if is_rank() and folder:
            rank = int(os.environ["RANK"])
            final = error is None or isinstance(error, (UserError, KeyboardInterrupt))
            final = final and not isinstance(error, ResourceError)
            made = Report(rank, status, text, error is not None and followed(error) is not None, final)
            write_atomic(Path(folder) / f"{rank}.json", json.dumps(attrs.asdict(made)))
            return True
        if file and error is not None:  # torchrun's summary has the first that ends, be it the cause or what followed
            about = {"py_callstack": text, "timestamp": str(int(time.time()))}
            message = {"message": followed(error) or f"{type(error).__name__}: {error}", "extraInfo": about}
            write_atomic(Path(file), json.dumps({"message": message}))
    except OSError:
        pass  # the message matters more than who prints it
    return False


class Elastic:
    """The launcher that the command line finds as an entry point of `detkernel.launchers`."""

    def options(self, command: str) -> list[click.Option]:
        processes = click.Option(
            ["--nproc-per-node"], metavar="N", help="run N processes (a number, or 'gpu'), as torchrun does"
        )
        again = click.Option(
            ["--max-restarts"],
            type=click.IntRange(min=0),
            metavar="N",
            help="with --nproc-per-node: when a process dies, start all again from the last checkpoint, up to N times",
        )
        number = click.IntRange(min=0)
        several = [
            click.Option(["--nnodes"], metavar="N", help="several machines: N; start the same command on each of them"),
            click.Option(["--node-rank"], type=number, metavar="K", help="this machine's number; else as they come"),
            click.Option(["--rdzv-endpoint"], metavar="HOST:PORT", help="where they meet: an address of one of them"),
            click.Option(
                ["--rdzv-timeout"],
                type=click.FloatRange(min=0, min_open=True),
                metavar="S",
                help="seconds that a machine waits for the others to come (600)",
            ),
        ]
        return [processes, *([again] if command == "run" else []), *several]

    def take_over(self, given: Mapping[str, Any], arguments: Sequence[str]) -> int | None:
        if is_rank():
            end_with_launcher()
            return None
        processes, restarts = given["nproc_per_node"], given.get("max_restarts")
        plan = Plan.from_options(given, restarts or 0)
        if processes is None and given.get("nnodes") is None:
            if restarts is not None:
                raise UserError(
                    "--max-restarts: needs --nproc-per-node (1 will do): one process cannot start itself again"
                )
            slurm.take_part()
            return None
        if given.get("nnodes") is None:
            plan = slurm.plan(restarts or 0)
        return launch(processes or "1", restarts or 0, arguments, plan)

    def launch(self) -> Launch:
        return launched()

    def report(self, status: int, error: BaseException | None, text: str) -> bool:
        return report(status, error, text)


launcher = Elastic()


def launch(processes: str, restarts: int, arguments: Sequence[str], plan: Plan | None = None) -> int:
    """Run `detkernel ARGUMENTS` in so many processes; returns the exit status of the run.

    `processes`: a number, or `gpu`, `cpu` or `auto` for as many as there are. A process that dies takes the others
    down, on all machines; all are then started again, up to `restarts` times. `plan`: the machines; None: this one.
    Raises `UserError` for processes that cannot be had, and machines that do not come.
    """
    if os.name != "posix":
        raise UserError("--nproc-per-node, --nnodes: several processes need a POSIX system, such as Linux")
    count = _count(processes)
    signals = _Signals()
    meeting = machines.alone() if plan is None else machines.meet(plan)
    os.environ[_IDENTITY], os.environ[_LAUNCHER] = meeting.identity, str(os.getpid())
    logging.disable(logging.CRITICAL)  # torch's account of the same
    with signals.held(), meeting:
        for attempt in range(restarts + 1):
            os.environ[_RESTARTS] = str(attempt)
            with tempfile.TemporaryDirectory(prefix="detkernel-") as folder:
                os.environ[_REPORTS] = folder
                agent = _agent(count, arguments, Path(folder), _Rendezvous(meeting, attempt))
                failures = _attempt(agent, signals)
                reports = [Report(**json.loads(path.read_text())) for path in Path(folder).glob("*.json")]
            end, stopped = _agreed(meeting, Ending(failures, reports), signals)
            if end.text:
                click.echo(end.text, err=True)
            if end.status == 0 or end.final or stopped or attempt == restarts:
                return end.status
            click.echo(f"starting again, {attempt + 1} of {restarts}", err=True)
    raise AssertionError("the last attempt returns")


@attrs.frozen
class Ending:
    """How an attempt ended on a machine."""

    failures: dict[int, int]
    """Exit statuses by rank, of what failed; -N: killed by signal N."""
    reports: list[Report]
    told: bool = False
    """Whether its launcher was told to stop."""
    impatient: bool = False

    @classmethod
    def read(cls, text: str) -> Ending:
        said = json.loads(text)
        failures = {int(rank): status for rank, status in said["failures"].items()}
        reports = [Report(**report) for report in said["reports"]]
        return cls(failures, reports, said["told"], said["impatient"])


def _agreed(meeting: Meeting, mine: Ending, signals: _Signals) -> tuple[Report, bool]:
    """How an attempt ended on all machines, the same on each of them, and whether it must be the last."""
    failed = any(report.text for report in mine.reports) or any(status < 0 for status in mine.failures.values())

    def hurried() -> bool:
        signals.pass_on([])
        return signals.impatient

    mine = attrs.evolve(mine, told=bool(signals.received), impatient=signals.impatient)
    said = meeting.exchange(json.dumps(attrs.asdict(mine)), failed, hurried)
    ends = [Ending.read(text) for text in said if text]
    failures = {rank: status for end in ends for rank, status in end.failures.items()}
    reports = [report for end in ends for report in end.reports]
    stopped = any(end.told for end in ends) or bool(meeting.gone)
    if signals.impatient or any(end.impatient for end in ends):
        return Report(0, 128 + signal.SIGINT, "interrupted", final=True), True
    end = _end(failures, reports)
    if meeting.gone and (end.follows or not end.text):
        return Report(end.rank, end.status or 1, meeting.gone), stopped
    if end.text and len(ends) > 1 and not end.final:
        machine = next(node for node, text in enumerate(said) if text and end.rank in _ranks(Ending.read(text)))
        end = attrs.evolve(end, text=f"on machine {machine} ({meeting.names[machine]}):\n{end.text}")
    return end, stopped


def _ranks(ending: Ending) -> set[int]:
    return {*ending.failures, *(report.rank for report in ending.reports)}


def _count(processes: str) -> int:
    if not re.fullmatch("[1-9][0-9]*|gpu|cpu|auto", processes):
        raise UserError(f"--nproc-per-node: expected a number, 'gpu', 'cpu' or 'auto', got '{processes}'")
    from torch.distributed.run import determine_local_world_size

    try:
        return int(determine_local_world_size(processes))
    except ValueError as error:
        raise UserError(f"--nproc-per-node: got '{processes}', but {error}") from None


def _attempt(agent: Any, signals: _Signals) -> dict[int, int]:
    """Start the processes, and wait for them; returns rank -> exit status (-N: killed by signal N) of what failed."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append(agent.run())
        except BaseException as error:
            outcome.append(error)

    thread = Thread(target=work, name="detkernel-agent")  # not here: the agent would take the signals
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
        signals.pass_on([worker.id for worker in agent.get_worker_group().workers if worker.id is not None])
    if isinstance(outcome[0], _DownError):
        return {}
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return {rank: failure.exitcode for rank, failure in outcome[0].failures.items()}


def _agent(count: int, arguments: Sequence[str], folder: Path, rendezvous: _Rendezvous) -> Any:
    """torch's agent for processes that meet in the launchers' store."""
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

    class Agent(LocalElasticAgent):
        def _exit_barrier(self) -> None:
            """The launchers wait for each other themselves, and longer than torch's five minutes."""

    if count > 1:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the device's `threads` says otherwise
    meeting = rendezvous.meeting
    if meeting.address == machines.HERE:
        for backend in ("GLOO", "NCCL"):  # whatever a cluster's profile says: nobody else takes part
            os.environ[f"{backend}_SOCKET_IFNAME"] = _loopback()
    elif "GLOO_SOCKET_IFNAME" not in os.environ and (name := machines.interface(meeting.address, meeting.port)):
        os.environ["GLOO_SOCKET_IFNAME"] = name  # or gloo takes what the host's name resolves to, loopback perhaps
    specification = WorkerSpec(
        role="default",
        local_world_size=count,
        entrypoint=sys.executable,
        args=("-u", "-P", "-m", "detkernel", *arguments),  # -P: without the current folder on the path
        rdzv_handler=rendezvous,  # type: ignore[arg-type]  # no base class of torch: the module is light
        max_restarts=0,
        monitor_interval=_POLL,
        local_addr=meeting.address,
    )
    logs = DefaultLogsSpecs(log_dir=str(folder / "torch"))
    return Agent(specification, logs_specs=logs)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in names if name.startswith("lo")), "lo")


class _DownError(Exception):
    """This machine's processes must not go on, since those of another do not."""


@attrs.frozen
class _Rendezvous:
    """A torch `RendezvousHandler` for launchers that have met. torch's own listen on every interface, to a store whose
    readers unpickle what is in it: from another machine they could be made to run code."""

    meeting: Meeting
    attempt: int

    use_agent_store = True
    """The processes meet in the agent's store instead of one that the first of them opens."""

    def get_backend(self) -> str:
        return "static"

    def get_run_id(self) -> str:
        return f"{self.meeting.identity}-{self.attempt}"

    def next_rendezvous(self) -> Any:
        from torch.distributed.elastic.rendezvous.api import RendezvousInfo, RendezvousStoreInfo

        met = self.meeting
        where = RendezvousStoreInfo(met.address, met.port)
        return RendezvousInfo(met.begin(self.attempt), met.node, len(met.names), where)

    def num_nodes_waiting(self) -> int:
        """Asked again and again while the processes run. Raises `_DownError`, and the agent ends them."""
        if self.meeting.is_down:
            raise _DownError
        return 0

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else could come."""

    def shutdown(self) -> bool:
        return True


def end_with_launcher() -> None:
    """In a process that `launch` has started: stop as at SIGTERM once the launcher is gone without a word.

    Nobody would see how it ends, and the store in which the processes met is gone too.
    """
    launcher = int(os.environ.get(_LAUNCHER) or 0)
    if is_rank() and launcher:
        Thread(target=_watch, args=(launcher,), name="detkernel-launcher", daemon=True).start()


def _watch(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK)
    shutil.rmtree(os.environ.pop(_REPORTS, ""), ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), _SIGKILL)


def _end(failures: dict[int, int], reports: Sequence[Report]) -> Report:
    """How the run ended, from how its processes did: the first cause counts, not what followed from it."""
    crashed = [rank for rank, status in failures.items() if status < 0 and _name(-status) in _CRASHES]
    told = sorted((said for said in reports if said.text), key=lambda said: (said.follows, said.rank))
    if crashed:
        return _killed(crashed[0], -failures[crashed[0]])
    if told and not told[0].follows:
        first = {said.text: said for said in reversed(told) if not said.follows}.values()
        texts = [said.text if said.final else f"rank {said.rank}:\n{said.text}" for said in reversed(first)]
        return attrs.evolve(told[0], text="\n".join(texts))
    stopped = [said for said in reports if not said.text]
    if stopped:
        return stopped[0]
    killed = [rank for rank, status in failures.items() if status < 0]
    if killed:
        return _killed(killed[0], -failures[killed[0]])
    if told:
        return told[0]
    rank, status = next(iter(failures.items()), (0, 0))
    return Report(rank, status, f"rank {rank} ended with exit status {status}" if status else "")


def _killed(rank: int, number: int) -> Report:
    """As a shell has it: 128 and the signal's number."""
    hint = "; the system does that when memory runs out (see `dmesg`)" if _name(number) == "SIGKILL" else ""
    return Report(rank, 128 + number, f"rank {rank} was killed by {_name(number)}{hint}")


def _name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


class _Signals:
    """Signals that this process gets are the run's: they are passed on to all of its processes."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._waiting: list[int] = []
        self._deadline = float("inf")
        self.impatient = False
        """Whether a second Ctrl-C had to kill."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """Behind it, where signals were received, further ones are ignored until the process has left: one more, while
        Python shuts down and its handlers are gone, would change the exit status."""
        numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
        wanted = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as nohup has it
        before = {number: signal.signal(number, self._receive) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self.received else handler)

    def pass_on(self, processes: Sequence[int]) -> None:
        while processes and self._waiting:
            _kill(processes, self._waiting.pop(0))
        if time.monotonic() > self._deadline:
            _kill(processes, _SIGKILL)
            self._deadline, self.impatient = float("inf"), True

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            self._deadline = min(self._deadline, time.monotonic() + _AT_ONCE)
        self.received.append(number)
        self._waiting.append(number)


def _kill(processes: Sequence[int], number: int) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue
