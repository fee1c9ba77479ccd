"""`--nnodes`: several machines of one run. Their launchers meet at an address of the first of them, `--rdzv-endpoint`,
and tell each other how their processes ended. Nothing of torch is imported until then.

They meet in one of torch's stores, which holds text here: nothing that is read from it is unpickled. The processes
themselves unpickle what the others send, so whoever can reach the address must be trusted.
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from threading import Event, Thread
from types import TracebackType
from typing import Any

import attrs
import click
from detkernel.errors import UserError, printable

HERE = "127.0.0.1"
_PORT = 29400
"""Where torchrun meets, if no port is given."""
_PATIENCE = 600.0
"""Seconds that a machine waits for the others to come, where `--rdzv-timeout` says nothing else."""
_POLL = 0.05
_BEAT = 2.0
"""Seconds between two signs of life of a launcher."""
_SILENCE = 60.0
"""Seconds without one after which a machine is taken for dead."""
_FAREWELL = 10.0
"""Seconds that the first machine keeps the store for the others, to read how the run ended."""
_ADDRESS = 0x8915
"""SIOCGIFADDR of Linux: the address of an interface."""


@attrs.frozen
class Plan:
    """Which machines are to meet, and where."""

    count: int
    host: str
    port: int
    node: int | None = None
    """This one's number, if it was given; else the first comes by the address, the others as they come."""
    patience: float = _PATIENCE
    restarts: int = 0

    @classmethod
    def from_options(cls, given: Mapping[str, Any], restarts: int = 0) -> Plan | None:
        """None where one machine is all there is. Raises `UserError` for what does not fit together."""
        nnodes, node, endpoint = (given.get(name) for name in ("nnodes", "node_rank", "rdzv_endpoint"))
        if nnodes is None:
            for option in ("node_rank", "rdzv_endpoint", "rdzv_timeout"):
                if given.get(option) is not None:
                    raise UserError(f"--{option.replace('_', '-')}: needs --nnodes, the number of machines")
            return None
        if not re.fullmatch("[1-9][0-9]*", nnodes):
            elastic = "; a run does not grow or shrink" if ":" in nnodes else ""
            raise UserError(f"--nnodes: expected the number of machines, got '{nnodes}'{elastic}")
        count = int(nnodes)
        if node is not None and node >= count:
            raise UserError(f"--node-rank: expected 0 to {count - 1}, since --nnodes is {count}, got {node}")
        if endpoint is None and count > 1:
            raise UserError(
                "--nnodes: needs --rdzv-endpoint HOST:PORT, an address of one of the machines that all of them reach"
            )
        if endpoint is None:
            return None
        return cls(count, *_endpoint(endpoint), node, given.get("rdzv_timeout") or _PATIENCE, restarts)


def _endpoint(text: str) -> tuple[str, int]:
    found = re.fullmatch(r"([A-Za-z0-9._-]+)(?::([0-9]+))?", text)
    if not found or not 0 < int(found[2] or _PORT) < 2**16:
        raise UserError(f"--rdzv-endpoint: expected HOST:PORT, with a port of 1 to 65535, got '{printable(text)}'")
    return found[1], int(found[2] or _PORT)


@attrs.define(eq=False)
class Meeting:
    """The launchers of a run, one a machine: what they tell each other, and whether all of them still live."""

    address: str
    port: int
    store: Any
    node: int = 0
    names: tuple[str, ...] = ("",)
    """The machines' names, by number."""
    identity: str = attrs.field(factory=lambda: uuid.uuid4().hex)
    attempt: int = 0
    gone: str = ""
    """Which machine is not there any more, and how that was found."""
    _failed: int = -1
    """The attempt that failed on another machine."""
    _left: Event = attrs.field(factory=Event)
    _thread: Thread | None = None

    @property
    def is_down(self) -> bool:
        """Whether this machine's processes must not go on: others failed, or are gone."""
        return bool(self.gone) or self._failed == self.attempt

    def __enter__(self) -> Meeting:
        if len(self.names) > 1:
            self._thread = Thread(target=self._listen, args=(self.store.clone(),), name="detkernel-beats", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()
            _part(self.store, 0 if self.gone else len(self.names), self.node)
        self.store = None

    def begin(self, attempt: int) -> Any:
        """A corner of the store for the agents, of an attempt."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        self.attempt = attempt
        return PrefixStore(f"agents/{attempt}", self.store.clone())

    def exchange(self, mine: str, failed: bool, hurried: Callable[[], bool]) -> list[str]:
        """Everybody's word on how an attempt ended, by the machine's number; empty where a machine is gone.

        `failed`: the others must not go on. `hurried`: whether to wait no longer.
        """
        from torch.distributed import DistError

        if len(self.names) == 1:
            return [mine]
        ends = [f"end/{self.attempt}/{node}" for node in range(len(self.names))]
        try:
            self.store.set(ends[self.node], mine)
            if failed:
                self.store.set(f"down/{self.attempt}", "")
            while not self.store.check(ends) and not self.gone and not hurried():
                time.sleep(_POLL)
            return [self.store.get(end).decode() if self.store.check([end]) else "" for end in ends]
        except DistError:
            self.gone = self.gone or self._first_is_gone()
            return [mine if node == self.node else "" for node in range(len(self.names))]

    def _listen(self, store: Any) -> None:
        """In a thread: give signs of life, look for those of the others, and for their failures."""
        from torch.distributed import DistError

        heard: dict[int, tuple[bytes, float]] = {}
        for beat in itertools.count():
            try:
                store.set(f"beat/{self.node}", str(beat))
                self._look(store, heard)
            except DistError:
                self.gone = self._first_is_gone()
            if self.gone or self._left.wait(_BEAT):
                return

    def _look(self, store: Any, heard: dict[int, tuple[bytes, float]]) -> None:
        attempt, now = self.attempt, time.monotonic()
        if store.check([f"down/{attempt}"]):
            self._failed = attempt
        for node, name in enumerate(self.names):
            key = f"beat/{node}"
            said = store.get(key) if store.check([key]) else b""
            if heard.setdefault(node, (said, now))[0] != said:
                heard[node] = said, now
            if now - heard[node][1] > _SILENCE and not store.check([f"end/{attempt}/{node}"]):
                self.gone = f"machine {node} ({name}) is gone: nothing was heard of it for {_SILENCE:g} s"

    def _first_is_gone(self) -> str:
        return f"machine 0 ({self.names[0]}) is gone: its launcher at {self.address}:{self.port} answers no more"


def alone() -> Meeting:
    """Of a single machine, which answers on the loopback interface only."""
    opened = socket.create_server((HERE, 0))
    port = opened.getsockname()[1]
    return Meeting(HERE, port, serve(HERE, port, opened))


def meet(plan: Plan) -> Meeting:
    """Wait for the other machines. Raises `UserError` where they do not come in time, or want something else."""
    until = time.monotonic() + plan.patience
    address = resolved(plan)
    opened = listening(plan, address)
    if opened is not None:
        click.echo(
            f"listening on {address}:{plan.port} for {plan.count} machines; whoever reaches that can run code here",
            err=True,
        )
        store, node = serve(address, plan.port, opened), 0
    else:
        store = _join(plan, address, until)
        node = store.add("arrivals", 1) if plan.node is None else plan.node
    _claim(store, plan, node)
    if node == 0:
        verdict = _verdict(store, plan, until)
        store.set("verdict", json.dumps(verdict))
    else:
        verdict = _awaited(store, plan, until)
    if "mistake" in verdict:
        _part(store, sum(store.check([key]) for key in _claims(plan)) if node == 0 else 0, node)
        raise UserError(verdict["mistake"])
    return Meeting(address, plan.port, store, node, tuple(verdict["names"]), verdict["identity"])


def resolved(plan: Plan) -> str:
    try:
        return socket.gethostbyname(plan.host)
    except OSError as error:
        raise UserError(f"--rdzv-endpoint: '{plan.host}' has no IPv4 address here: {error.strerror}") from None


def listening(plan: Plan, address: str) -> socket.socket | None:
    """The socket of the first machine; None on the others, whose address it is not, or where one listens already."""
    if plan.node not in (None, 0):
        return None
    try:
        return socket.create_server((address, plan.port))
    except OSError as error:
        if plan.node is None and error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
            return None
        rank = "" if plan.node is None else ", whose --node-rank is 0,"
        raise UserError(
            f"--rdzv-endpoint: this machine{rank} cannot listen on {address}:{plan.port}: {error.strerror}"
        ) from None


def serve(address: str, port: int, opened: socket.socket) -> Any:
    """A store that answers at a socket."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=opened.detach())


def _join(plan: Plan, address: str, until: float) -> Any:
    """The first machine's store."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    where = f"{plan.host}:{plan.port}"
    while True:  # rather than torch, which says on standard error how often it tried
        try:
            socket.create_connection((address, plan.port), timeout=max(0.1, until - time.monotonic())).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--rdzv-endpoint: nobody answered at {where} for {plan.patience:g} s ({error.strerror or error}); "
                    "give an address that one of the machines has itself and all others reach, and start that one too"
                ) from None
            time.sleep(_POLL)
    try:
        left = timedelta(seconds=max(1.0, until - time.monotonic()))
        return TCPStore(address, plan.port, is_master=False, wait_for_workers=False, timeout=left)
    except DistError:
        raise UserError(f"--rdzv-endpoint: what listens at {where} is not a run; use another port") from None


def _claim(store: Any, plan: Plan, node: int) -> None:
    """Say what this machine was started with. Raises `UserError` where its number is taken."""
    claim = {"name": printable(socket.gethostname()), "count": plan.count, "restarts": plan.restarts}
    text = json.dumps({**claim, "numbered": plan.node is not None, "id": uuid.uuid4().hex})
    if node < plan.count and store.compare_set(f"node/{node}", "", text).decode() == text:
        return
    if plan.node is not None:
        store.set("mistake", f"--node-rank: two machines say that they are number {node}")
        raise UserError(f"--node-rank: another machine has number {node} already")
    raise UserError(f"--nnodes: {plan.count} machines have met at {plan.host}:{plan.port} already; this is one more")


def _verdict(store: Any, plan: Plan, until: float) -> dict[str, Any]:
    """Of the first machine, on all claims: the names of all, or what is wrong with them."""
    while True:
        said = [json.loads(store.get(key)) for key in _claims(plan) if store.check([key])]
        for claim in said[1:]:
            names = f"'{said[0]['name']}'", f"'{claim['name']}'"
            for key, option in (("count", "--nnodes"), ("restarts", "--max-restarts")):
                if claim[key] != said[0][key]:
                    return {"mistake": f"{option}: {said[0][key]} on {names[0]}, but {claim[key]} on {names[1]}"}
            if claim["numbered"] != said[0]["numbered"]:
                return {"mistake": "--node-rank: give it on all machines or on none"}
        if store.check(["mistake"]):
            return {"mistake": store.get("mistake").decode()}
        if len(said) == plan.count:
            return {"names": [claim["name"] for claim in said], "identity": uuid.uuid4().hex}
        if time.monotonic() > until:
            return {"mistake": f"--nnodes: {len(said)} of {plan.count} machines came within {plan.patience:g} s"}
        time.sleep(_POLL)


def _claims(plan: Plan) -> list[str]:
    return [f"node/{node}" for node in range(plan.count)]


def _awaited(store: Any, plan: Plan, until: float) -> dict[str, Any]:
    """What the first machine says of all claims."""
    from torch.distributed import DistError

    try:
        while time.monotonic() < until + _FAREWELL:
            if store.check(["verdict"]):
                verdict: dict[str, Any] = json.loads(store.get("verdict"))
                return verdict
            time.sleep(_POLL)
    except DistError:
        pass
    return {"mistake": f"--rdzv-endpoint: the machine at {plan.host}:{plan.port} has left"}


def _part(store: Any, count: int, node: int) -> None:
    """Leave, the first machine last of all: it has what the others want to read."""
    from torch.distributed import DistError

    try:
        store.add("left", 1)
        until = time.monotonic() + _FAREWELL
        while node == 0 and store.add("left", 0) < count and time.monotonic() < until:
            time.sleep(_POLL)
    except DistError:
        pass


def interface(address: str, port: int) -> str | None:
    """The name of the network interface that leads to an address; None where the system does not tell."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            import fcntl

            asked.connect((address, port))  # nothing is sent
            own = asked.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    found = fcntl.ioctl(asked.fileno(), _ADDRESS, struct.pack("256s", name[:15].encode()))
                except OSError:
                    continue  # it has no address
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
        except (ImportError, OSError):
            pass
    return None
