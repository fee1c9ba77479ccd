"""Shared by the kernel's tests: a folder to work in, distributions planted in it, and the command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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


@pytest.fixture
def detkernel(folder: Path) -> Detkernel:
    """Run the command in the current folder, as a user would, with `site` installed."""

    def run(*arguments: object, env: dict[str, str] | None = None) -> Result:
        path = os.pathsep.join(filter(None, [str(folder / "site"), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "detkernel", *map(str, arguments)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": path, **(env or {})},
            timeout=120,
        )

    return run
