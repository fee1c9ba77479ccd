"""A plugin written outside the tree: installed with pip, or named by its file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Detkernel, Warm

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "greeter"
version = "3.1"
dependencies = ["detkernel-kernel>=0.1,<0.2"]
[project.entry-points."detkernel.plugins"]
greeter = "greeter:Greeter"
[tool.hatch.build.targets.wheel]
only-include = ["greeter.py"]
"""
MODULE = '''
from detkernel import hookimpl, option, plugin

@plugin
class Greeter:
    """Say something after some iterations."""

    words: str = option(default="hello", help="what to say")
    every: int = option(default=1, at_least=1, help="iterations in between")

    @hookimpl
    def after_train_iter(self, run):
        if run.iter % self.every == 0:
            print(f"{self.words} {run.iter}")
'''
CONFIG = """
run: {until: 2 iters, work_dir: work}
model: {use: tiny.py:TinyDetector}
data: {use: tiny.py:TinyData}
optimizer: {use: tiny.py:TinySgd}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "greeter").mkdir()
    (tmp_path / "greeter" / "pyproject.toml").write_text(PYPROJECT)
    (tmp_path / "greeter" / "greeter.py").write_text(MODULE)
    (tmp_path / "tiny.py").write_text("from detkernel_detection.testing import TinyData, TinyDetector, TinySgd\n")
    (tmp_path / "config.yaml").write_text(CONFIG + "greeter: {words: bonjour}\n")
    return tmp_path


@pytest.fixture
def installed(folder: Path) -> dict[str, str]:
    """The environment of a command that sees the plugin, installed by pip into a folder of its own."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, folder / "site", folder / "greeter"], check=True, capture_output=True, cwd=folder)
    return {"PYTHONPATH": os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])}


def test_installed_it_is_seen_and_runs(folder: Path, installed: dict[str, str], detkernel: Detkernel) -> None:
    listed = detkernel("plugins", env=installed).stdout
    assert "hook, of greeter 3.1\n  greeter  Say something after some iterations.\n" in listed
    assert "greeter:Greeter" in detkernel("hooks", "config.yaml", env=installed).stdout
    result = detkernel("run", "config.yaml", env=installed)
    assert (result.returncode, result.stdout) == (0, "bonjour 1\nbonjour 2\n"), result.stderr
    assert "# greeter 3.1" in (folder / "work" / "config.yaml").read_text()


def test_not_installed_it_is_one_clear_line(folder: Path, detkernel: Detkernel) -> None:
    result = detkernel("run", "config.yaml")
    assert result.returncode == 2
    assert "config.yaml:6:10: greeter: there is no plugin 'greeter'" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_same_class_from_its_file(folder: Path, detkernel: Detkernel) -> None:
    (folder / "config.yaml").write_text(CONFIG + "mine: {use: ./greeter/greeter.py:Greeter, every: 2}\n")
    result = detkernel("run", "config.yaml")
    assert (result.returncode, result.stdout) == (0, "hello 2\n"), result.stderr
    assert "greeter.py:Greeter" in detkernel("hooks", "config.yaml").stdout


def test_a_misspelt_option_names_its_place(folder: Path, installed: dict[str, str], detkernel: Detkernel) -> None:
    (folder / "config.yaml").write_text(CONFIG + "greeter: {wrods: salut}\n")
    result = detkernel("run", "config.yaml", env=installed)
    assert result.returncode == 2
    assert "config.yaml:6:11: greeter.wrods: there is no option 'wrods', did you mean 'words'?" in result.stderr


LISTED = {
    "model": "A detector of one box an image",
    "dataset": "Images listed in a CSV file",
    "transform": "Darken or brighten some images.",
    "evaluator": "Share of the annotated boxes",
    "hook": "Stop the run when the loss",
}


KINDS = ("model", "dataset", "transform", "evaluator", "hook", "command")
LONG = "test_finds_what_it_learned or test_overfits_two_images or test_merges_over_processes"
"""What of a contract takes longest; `tox -e torture` has it here, and the plugins' own tests everywhere."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, python: Warm) -> Path:
    """A new plugin of each kind, installed, in the folder of a project with settings for pytest of its own."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--import-mode=importlib"\n')
    for kind in KINDS:
        new = python("-m", "detkernel", "new-plugin", f"my{kind}", "--kind", kind, cwd=folder)
        assert new.returncode == 0, new.stderr
    pip = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    installed = python(*pip, "site", *(f"./my{kind}" for kind in KINDS), cwd=folder)
    assert installed.returncode == 0, installed.stderr
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_plugin_passes_its_tests(kind: str, made: Path, python: Warm) -> None:
    fewer = [] if "DETKERNEL_LONG" in os.environ else ["-k", f"not ({LONG})"]
    env = {"PYTHONPATH": str(made / "site")}
    tests = python(
        "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", *fewer, cwd=made / f"my{kind}", env=env
    )
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout


def test_new_plugins_are_listed(made: Path, detkernel: Detkernel) -> None:
    env = {"PYTHONPATH": str(made / "site")}
    listing = " ".join((detkernel("--help", env=env).stdout + detkernel("plugins", env=env).stdout).split())
    for kind in KINDS:
        assert f"my{kind} {LISTED.get(kind, '')}".strip() in listing


def test_a_new_plugin_overwrites_nothing(tmp_path: Path, detkernel: Detkernel) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("x")
    result = detkernel("new-plugin", "mine")
    assert result.returncode == 2
    assert "mine exists and is not empty" in result.stderr
    assert detkernel("new-plugin", "class").returncode == 2
