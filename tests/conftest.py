"""Shared by the tests of the whole system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it

ROOT = Path(__file__).parents[1]
long = pytest.mark.skipif("DETKERNEL_LONG" not in os.environ, reason="takes long: in `tox -e torture`")
Detkernel = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own cache folder is left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


class Warm:
    """Commands of a Python that has imported torch (`warm.py`), one after the other, each a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-P", str(ROOT / "tests/warm.py")]
        self._python = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._out, self._err = folder / "out.txt", folder / "err.txt"

    def __call__(self, *argv: object, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        for path in (self._out, self._err):
            path.unlink(missing_ok=True)
        given, files = [str(part) for part in argv], {"out": str(self._out), "err": str(self._err)}
        asked = {"argv": given, "cwd": str(cwd), "env": {**os.environ, **(env or {})}, **files}
        self._python.stdin.write(json.dumps(asked) + "\n")
        self._python.stdin.flush()
        timer = threading.Timer(300, self._python.kill)
        timer.start()
        status = self._python.stdout.readline()
        timer.cancel()
        assert status, f"{given} took more than 300 s"
        return subprocess.CompletedProcess(given, int(status), self._out.read_text(), self._err.read_text())

    def close(self) -> None:
        self._python.communicate()


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """Run a script or a module in a process of its own: `python("script.py", cwd=tmp_path)`."""
    warm = Warm(tmp_path_factory.mktemp("warm"))
    yield warm
    warm.close()


@pytest.fixture
def detkernel(tmp_path: Path, python: Warm) -> Detkernel:
    """Run the command in `tmp_path`, as a user would: `detkernel("run", "config.yaml", env={...})`."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return python("-m", "detkernel", *arguments, cwd=tmp_path, env={"NO_COLOR": "1", **(env or {})})

    return run


@pytest.fixture
def detkernel_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Detkernel:
    """The same in this process, which has torch loaded already: for many short runs."""
    from detkernel.cli import main

    def run(*arguments: object, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["detkernel", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, status, out, err)

    return run


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real data sets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DETKERNEL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real data here: set DETKERNEL_DATA")
    return folder
