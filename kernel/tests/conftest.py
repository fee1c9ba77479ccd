"""Shared by the kernel's tests: a folder to work in, distributions planted in it, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

Result = subprocess.CompletedProcess[str]
Write = Callable[[str, str], Path]
Plant = Callable[..., Path]
Detkernel = Callable[..., Result]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty. What is imported from it is forgotten again."""
    known = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def write(folder: Path) -> Write:
    """`write("a.yaml", text)` in the current folder; the text may be indented."""

    def write(name: str, text: str) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    return write


@pytest.fixture
def plant(write: Write) -> Plant:
    """Install a distribution into `site`, as pip would: its modules, METADATA and entry_points.txt.

    plant("fake", {"fake.py": source}, plugins={"name": "fake:Class"}, requires=["detkernel-kernel<9"])
    """

    def plant(
        name: str,
        modules: dict[str, str],
        *,
        version: str = "1.0",
        plugins: dict[str, str] | None = None,
        commands: dict[str, str] | None = None,
        configs: dict[str, str] | None = None,
        templates: dict[str, str] | None = None,
        launchers: dict[str, str] | None = None,
        requires: tuple[str, ...] = (),
    ) -> Path:
        info = f"site/{name.replace('-', '_')}-{version}.dist-info"
        needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
        write(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        groups = {
            "detkernel.plugins": plugins or {},
            "detkernel.commands": commands or {},
            "detkernel.configs": configs or {},
            "detkernel.templates": templates or {},
            "detkernel.launchers": launchers or {},
        }
        lines = [
            line
            for group, points in groups.items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in points.items()))
        ]
        path = write(f"{info}/entry_points.txt", "\n".join(lines) + "\n")
        for file, text in modules.items():
            write(f"site/{file}", text)
        return path.parent

    return plant


SERVER = """
import importlib, json, os, runpy, sys
import detkernel.cli, detkernel.config.schema, detkernel.listing, detkernel.reference, detkernel.scaffold
import packaging.requirements

for line in sys.stdin:
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    arguments, folder, env, out, err = json.loads(line)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.argv[1:] = arguments
    sys.path[:0] = ["", *filter(None, env["PYTHONPATH"].split(os.pathsep))]
    importlib.invalidate_caches()
    runpy.run_module("detkernel", run_name="__main__", alter_sys=True)
    break
"""
"""A Python that has imported the kernel forks for each command: a process of its own, without a fifth of a second."""


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Result]]:
    """`detkernel` with these arguments, in this folder and environment."""
    out, err = (tmp_path_factory.mktemp("forked") / name for name in ("out.txt", "err.txt"))
    command = [sys.executable, "-P", "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(arguments: list[str], folder: Path, env: dict[str, str]) -> Result:
            assert server.stdin
            assert server.stdout
            for path in (out, err):
                path.unlink(missing_ok=True)
            server.stdin.write(json.dumps([arguments, str(folder), env, str(out), str(err)]) + "\n")
            server.stdin.flush()
            timer = threading.Timer(120, server.kill)
            timer.start()
            status = server.stdout.readline()
            timer.cancel()
            assert status, f"{arguments} took more than 120 s"
            return subprocess.CompletedProcess(arguments, int(status), out.read_text("utf-8"), err.read_text("utf-8"))

        yield run


@pytest.fixture
def detkernel(folder: Path, forked: Callable[..., Result]) -> Detkernel:
    """Run the command in the current folder, as a user would, with `site` installed."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
        path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
        return forked(
            [*map(str, arguments)], folder, {**os.environ, "NO_COLOR": "1", "PYTHONPATH": path, **(env or {})}
        )

    return run
