"""Launchers of several machines: how they meet, what they tell each other, and what Slurm says. Real processes:
`tests/test_machines.py`."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch  # noqa: F401 - now, or its first import would be in a thread
from detkernel import UserError
from detkernel.processes import Processes
from detkernel_detection.testing import tiny_kernel
from detkernel_runtime import settings
from detkernel_runtime.device import Device
from detkernel_runtime.parallel import group, launch, machines, slurm
from detkernel_runtime.parallel.group import Places
from detkernel_runtime.parallel.launch import Ending, Report
from detkernel_runtime.parallel.machines import Meeting, Plan
from detkernel_runtime.parallel.slurm import Task

NOTHING = {
    **{"nproc_per_node": None, "max_restarts": None, "nnodes": None},
    **{"node_rank": None, "rdzv_endpoint": None, "rdzv_timeout": None},
}


@pytest.fixture
def port() -> int:
    with socket.create_server((machines.HERE, 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_BEAT", 0.02)
    monkeypatch.setattr(machines, "_FAREWELL", 1.0)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each gives or raises, called at the same time."""

    def caught(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(caught, calls))


def met(*plans: Plan) -> list[Any]:
    return together(*(lambda plan=plan: machines.meet(plan) for plan in plans))


def two(port: int, **options: Any) -> Plan:
    return attrs.evolve(Plan(2, "127.0.0.1", port, patience=20.0), **options)


def test_two_machines_meet_and_know_each_other(port: int, capsys: pytest.CaptureFixture[str]):
    first, second = sorted(met(two(port), two(port)), key=lambda meeting: meeting.node)
    assert (first.node, second.node) == (0, 1)
    assert first.identity == second.identity
    assert len(first.names) == len(second.names) == 2
    said = f"listening on 127.0.0.1:{port} for 2 machines; whoever reaches that can run code here\n"
    assert capsys.readouterr().err == said


def test_machines_have_the_numbers_that_they_were_given(port: int):
    second, first = met(two(port, node=1), two(port, node=0))
    assert (first.node, second.node) == (0, 1)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({}, {"count": 3}, r"--nnodes: [23] on '.*', but [23] on '.*'"),
        ({"restarts": 1}, {"restarts": 2}, r"--max-restarts: [12] on '.*', but [12] on '.*'"),
        ({"node": 0}, {}, "--node-rank: give it on all machines or on none"),
    ],
)
def test_machines_that_were_started_otherwise_all_say_so(port: int, one: dict, other: dict, message: str):
    said = met(attrs.evolve(two(port), **one), attrs.evolve(two(port), **other))
    assert said[0] == said[1]
    assert re.fullmatch(message, said[0])


def test_a_number_is_taken_once(port: int):
    first, *others = met(two(port, node=0, count=3), two(port, node=1, count=3), two(port, node=1, count=3))
    assert first == "--node-rank: two machines say that they are number 1"
    assert sorted(others) == ["--node-rank: another machine has number 1 already", first]


def test_machines_that_do_not_come_are_waited_for_so_long(port: int):
    said = met(two(port, patience=0.1))[0]
    assert said == "--nnodes: 1 of 2 machines came within 0.1 s"
    said = met(two(port, node=1, patience=0.1))[0]
    assert said.startswith(
        f"--rdzv-endpoint: nobody answered at 127.0.0.1:{port} for 0.1 s (Connection refused); give "
    )


def test_one_machine_too_many(port: int):
    first, second, third = met(two(port), two(port), two(port))
    [said] = [text for text in (first, second, third) if isinstance(text, str)]
    assert said == f"--nnodes: 2 machines have met at 127.0.0.1:{port} already; this is one more"


def test_an_address_that_is_not_this_machines(port: int):
    plan = Plan(2, "192.0.2.1", port, node=0)
    assert met(plan)[0].startswith(
        f"--rdzv-endpoint: this machine, whose --node-rank is 0, cannot listen on 192.0.2.1:{port}: "
    )
    assert met(Plan(2, "nowhere.invalid", port))[0].startswith(
        "--rdzv-endpoint: 'nowhere.invalid' has no IPv4 address here: "
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nnodes": "2"}, "--nnodes: needs --rdzv-endpoint HOST:PORT, an address of one of the machines that all "),
        ({"nnodes": "1:4"}, "--nnodes: expected the number of machines, got '1:4'; a run does not grow or shrink"),
        ({"nnodes": "none"}, "--nnodes: expected the number of machines, got 'none'"),
        ({"rdzv_endpoint": "a:1"}, "--rdzv-endpoint: needs --nnodes, the number of machines"),
        ({"node_rank": 0}, "--node-rank: needs --nnodes, the number of machines"),
        ({"rdzv_timeout": 1.0}, "--rdzv-timeout: needs --nnodes, the number of machines"),
        ({"nnodes": "2", "node_rank": 2, "rdzv_endpoint": "a:1"}, "--node-rank: expected 0 to 1, since --nnodes is 2"),
        *(
            ({"nnodes": "2", "rdzv_endpoint": wrong}, "--rdzv-endpoint: expected HOST:PORT, with a port of 1 to 65535")
            for wrong in ("", "a:", "a:0", "a:65536", "a b:1", "http://a:1", ":1")
        ),
    ],
)
def test_options_that_do_not_fit_are_one_line(options: dict, message: str):
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        launch.launcher.take_over({**NOTHING, **options}, [])


def test_options_are_torchruns():
    given = {**NOTHING, "nnodes": "2", "node_rank": 1, "rdzv_endpoint": "gpu1", "rdzv_timeout": 5.0}
    assert Plan.from_options(given, restarts=3) == Plan(2, "gpu1", 29400, 1, 5.0, 3)
    assert Plan.from_options({**NOTHING, "nnodes": "1"}) is None
    assert {option.name for option in launch.launcher.options("run")} == set(NOTHING)


def pair() -> tuple[Meeting, Meeting]:
    """Two launchers that have met."""
    first = attrs.evolve(machines.alone(), names=("a", "b"))
    return first, attrs.evolve(first, node=1, store=first.store.clone())


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_attempt_that_failed_on_one_machine_ends_on_the_other():
    first, second = pair()
    with first, second:
        for attempt, failed in enumerate([True, False]):
            first.begin(attempt)
            second.begin(attempt)
            assert not second.is_down
            rendezvous = launch._Rendezvous(second, attempt)
            assert rendezvous.num_nodes_waiting() == 0
            ends = together(
                lambda failed=failed: first.exchange("one", failed, lambda: False),
                lambda failed=failed: (
                    until(lambda: second.is_down is failed),
                    second.exchange("two", False, lambda: False),
                )[1],
            )
            assert ends == [["one", "two"]] * 2
            assert second.is_down is failed
            if failed:
                with pytest.raises(launch._DownError):
                    rendezvous.num_nodes_waiting()


def test_a_machine_that_is_silent_is_taken_for_dead(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machines, "_SILENCE", 0.3)
    first, second = pair()
    with first:
        second.begin(0)
        assert first.exchange("one", False, lambda: False) == ["one", ""]
        assert first.gone == "machine 1 (b) is gone: nothing was heard of it for 0.3 s"
        assert first.is_down


def test_nobody_is_waited_for_in_a_hurry():
    first, second = pair()
    with first, second:
        assert first.exchange("one", False, lambda: True) == ["one", ""]


def ended(*ends: Ending, node: int = 0, gone: str = "") -> tuple[Report, bool]:
    """What a launcher makes of how an attempt ended on each machine."""

    @attrs.define
    class Said:
        names: tuple[str, ...] = ("a", "b")
        gone: str = ""
        failed: bool = False

        def exchange(self, mine: str, failed: bool, hurried: Callable[[], bool]) -> list[str]:
            self.failed = failed
            others = [json.dumps(attrs.asdict(end)) for end in ends]
            return [mine if number == node else other for number, other in enumerate(others)] + [""] * (len(ends) < 2)

    said: Any = Said(gone=gone)
    return launch._agreed(said, ends[node], launch._Signals())


def test_machines_agree_on_how_the_run_ended():
    bug = Ending({1: 1}, [Report(1, 1, "Traceback: bug")])
    follower = Ending({}, [Report(0, 1, "Traceback: connection lost", follows=True)])
    for node in range(2):
        end, stopped = ended(follower, bug, node=node)
        assert (end.status, end.text, stopped) == (1, "on machine 1 (b):\nrank 1:\nTraceback: bug", False)
        end, _ = ended(follower, Ending({1: -9}, []), node=node)
        assert end.status == 137
        assert end.text.startswith("on machine 1 (b):\nrank 1 was killed by SIGKILL")
    stop = Ending({0: 75}, [Report(0, 75, final=True)])
    assert ended(stop, attrs.evolve(stop, told=True)) == (Report(0, 75, final=True), True)
    assert ended(Ending({}, []), Ending({}, []))[0].status == 0
    mistake = Ending({0: 2}, [Report(0, 2, "error: yours", final=True)])
    assert ended(mistake, Ending({}, []))[0].text == "error: yours"
    assert ended(follower, attrs.evolve(bug, impatient=True)) == (Report(0, 130, "interrupted", final=True), True)


def test_a_machine_that_is_gone_is_the_cause_where_nothing_else_is():
    follower = Ending({0: 1}, [Report(0, 1, "Traceback: connection lost", follows=True)])
    assert ended(follower, gone="machine 1 (b) is gone") == (Report(0, 1, "machine 1 (b) is gone"), True)
    assert ended(Ending({}, []), gone="machine 1 (b) is gone") == (Report(0, 1, "machine 1 (b) is gone"), True)
    bug = Ending({0: 1}, [Report(0, 1, "Traceback: bug")])
    assert ended(bug, gone="machine 1 (b) is gone")[0].text == "rank 0:\nTraceback: bug"


STEP = {
    **{"SLURM_STEP_NUM_TASKS": "5", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"},
    **{"SLURM_STEP_NODELIST": "gpu[003-004,009],login1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"},
    **{"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_RESTART_COUNT": "1"},
}


def test_a_task_of_slurm():
    assert Task.from_environment(STEP) == Task(3, 5, 1, 2, "gpu003", 20000 + 77 * 31 + 2, "slurm 77.2", 1)
    moved = Task.from_environment({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "SLURM_NODEID": "2"})
    assert (moved.host, moved.port, moved.local_count) == ("10.0.0.1", 1234, 1)
    for alone in ({}, {"SLURM_NTASKS": "5", "SLURM_PROCID": "0"}, {**STEP, "SLURM_STEP_NUM_TASKS": "1"}):
        assert Task.from_environment(alone) is None, "a batch script is a step of one task"
    assert Task.from_environment({**STEP, "RANK": "0"}) is None, "somebody else has started it"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("r[1-2]n[01-04],x", "r1n01"), ("n[7]", "n7"), ("n[08,10-11]", "n08")],
)
def test_the_first_of_slurms_list_of_nodes(nodes: str, first: str):
    assert slurm._first(nodes) == first


def test_variables_of_slurm_that_do_not_go_together():
    with pytest.raises(UserError, match=r"^Slurm: .*, but SLURM_PROCID is 'missing'; start the run with `srun detk.*$"):
        Task.from_environment({key: value for key, value in STEP.items() if key != "SLURM_PROCID"})


def test_a_task_with_processes_of_its_own_is_a_machine(monkeypatch: pytest.MonkeyPatch):
    for key, value in STEP.items():
        monkeypatch.setenv(key, value)
    called: list[Any] = []
    monkeypatch.setattr(launch, "launch", lambda *arguments: called.append(arguments) or 0)
    assert launch.launcher.take_over({**NOTHING, "nproc_per_node": "2", "max_restarts": 1}, ["run"]) == 0
    launch.launcher.take_over({**NOTHING, "nproc_per_node": "2", "nnodes": "1"}, ["run"])
    plan = Plan(5, "gpu003", 20000 + 77 * 31 + 2, 3, restarts=1)
    assert called == [("2", 1, ["run"], plan), ("2", 0, ["run"], None)]


def test_the_one_gpu_that_slurm_shows_a_task_is_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", slurm.TASK: "1"}
    assert settings.choose(Device(), Places.from_environment(environment)).index == 0
    del environment[slurm.TASK]
    with pytest.raises(UserError, match="rank 1 needs GPU 1"):
        settings.choose(Device(), Places.from_environment(environment))


@pytest.mark.parametrize("shared", [True, False])
def test_a_work_dir_that_machines_do_not_share(shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group, "_APPEARS", 0.0)
    barrier, said = threading.Barrier(2), {}

    @attrs.define
    class Two(Processes):
        rank: int

        def gathered(self, value: Any) -> list[Any]:
            said[self.rank] = value
            barrier.wait(20)
            return [said[0], said[1]]

        def from_main(self, make: Callable[[], Any]) -> Any:
            if self.rank == 0:
                try:
                    said["made"] = make()
                except UserError as error:
                    said["made"] = error
            barrier.wait(20)
            if isinstance(said["made"], UserError):
                raise said["made"]
            return said["made"]

    runs = []
    for rank in range(2):
        run = tiny_kernel(work_dir=tmp_path / ("work" if shared else f"work{rank}")).state
        run.processes = Two(rank)
        runs.append(run)
    found = together(*(lambda run=run: group.require_shared_work_dir(run) for run in runs))
    assert found[0] == found[1]
    assert (
        (found[0] is None)
        if shared
        else found[0].startswith("run.work_dir: ") and "that all machines share" in found[0]
    )
    assert list(tmp_path.iterdir()) == [], "nothing is left of the question"


def test_only_machines_that_are_several_are_asked():
    environment = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    assert not Places.from_environment(environment).several_machines
    assert not Places.from_environment({**environment, "LOCAL_WORLD_SIZE": "2"}).several_machines
    assert Places.from_environment({**environment, "LOCAL_WORLD_SIZE": "1"}).several_machines
