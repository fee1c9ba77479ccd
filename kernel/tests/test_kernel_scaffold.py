"""`detkernel new-plugin`: a project that installs, is listed, and passes its own tests as written."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from detkernel import UserError, scaffold

Plant = Callable[..., Path]
Write = Callable[[str, str], Path]
Detkernel = Callable[..., subprocess.CompletedProcess[str]]

KINDS = ["hook", "command"]
"""The kernel's own; other distributions offer theirs."""


@pytest.fixture
def install(plant: Plant, folder: Path) -> Callable[[str], None]:
    """Install a project as `pip install -e` would, by what its pyproject.toml says."""

    def install(name: str) -> None:
        project = tomllib.loads((folder / name / "pyproject.toml").read_text())
        points = project["project"]["entry-points"]
        plant(
            project["project"]["name"],
            {},
            version=project["project"]["version"],
            plugins=points.get("detkernel.plugins"),
            commands=points.get("detkernel.commands"),
            requires=tuple(project["project"]["dependencies"]),
        )
        for file in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]:
            (folder / "site" / file).symlink_to(folder / name / file)

    return install


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_whole_project(detkernel: Detkernel, folder: Path, kind: str):
    result = detkernel("new-plugin", "Box-Counter 2", "--kind", kind)
    assert (result.returncode, result.stderr) == (0, "")
    root = folder / "box-counter-2"
    files = sorted(path.name for path in root.iterdir())
    assert files == ["README.md", "box_counter_2.py", "pyproject.toml", "test_box_counter_2.py"]
    assert result.stdout.splitlines() == [
        *(f"wrote box-counter-2/{name}" for name in ("pyproject.toml", "README.md", "box_counter_2.py")),
        "wrote box-counter-2/test_box_counter_2.py",
        "next: cd box-counter-2 && pip install -e .[test] && pytest",
    ]
    for name in files:
        text = (root / name).read_text()
        assert not any(mark in text.lower() for mark in ("my_plugin", "my-plugin", "myplugin"))
        assert "@" not in text or name.endswith(".py")


def test_it_is_listed_and_shown(detkernel: Detkernel, install: Callable[[str], None]):
    detkernel("new-plugin", "box-counter", "--kind", "hook")
    install("box-counter")
    result = detkernel("plugins")
    assert (result.returncode, result.stderr) == (0, "")
    assert "hook, of box-counter 0.1.0 box_counter Stop the run when the loss" in " ".join(result.stdout.split())
    page = detkernel("plugins", "show", "box_counter")
    assert page.returncode == 0
    assert page.stdout.startswith("box_counter (box_counter:BoxCounter, box-counter 0.1.0)")


@pytest.mark.parametrize("kind", KINDS)
def test_its_tests_pass_as_written(detkernel: Detkernel, install: Callable[[str], None], folder: Path, kind: str):
    """The tests of the whole system install every kind with pip, and run it."""
    detkernel("new-plugin", "box-counter", "--kind", kind)
    install("box-counter")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=folder / "box-counter",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(folder / "site")},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{2 if kind == 'command' else 3} passed" in result.stdout


def test_its_readme_shows_a_config_that_loads(
    detkernel: Detkernel, install: Callable[[str], None], folder: Path, write: Write
):
    detkernel("new-plugin", "box-counter", "--kind", "hook")
    install("box-counter")
    block = (folder / "box-counter" / "README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    write("c.yaml", f"run: {{until: 1 epoch}}\n{block}")
    result = detkernel("config", "c.yaml")
    assert (result.returncode, result.stderr) == (0, "")
    assert "threshold: 0.2" in result.stdout


@pytest.mark.parametrize("name", ["", "-", "12", "a/b", "../up", "é", "a b!", "none?"])
def test_a_name_that_is_none(detkernel: Detkernel, folder: Path, name: str):
    result = detkernel("new-plugin", "--", name)
    assert result.returncode == 2
    assert result.stderr == f"error: '{name}': expected a name of letters, digits and dashes, such as my-plugin\n"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("class", "hook", "class is a Python keyword"),
        *((name, "hook", "a config gives this word a meaning of its own") for name in ("run", "base", "use", "None")),
        *((name, "command", "the kernel has a command of this name") for name in ("run", "check", "new_plugin")),
        ("recorder", "hook", "the project would use this name for something else"),
        ("test-contract", "hook", "pytest takes what begins with 'test' for tests"),
        ("tester", "hook", "pytest takes what begins with 'test' for tests"),
        ("exception", "hook", "Exception is a name of Python's own"),
        ("sorted", "command", "sorted is a name of Python's own"),
    ],
)
def test_a_name_that_cannot_work(detkernel: Detkernel, folder: Path, name: str, kind: str, reason: str):
    result = detkernel("new-plugin", name, "--kind", kind)
    assert (result.returncode, result.stderr) == (2, f"error: '{name}': {reason}; choose another name\n")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_name_in_the_manual_works(detkernel: Detkernel, kind: str):
    assert detkernel("new-plugin", "my-plugin", "--kind", kind).returncode == 0


@pytest.mark.parametrize("name", ["json", "detkernel", "sys", "Click"])
def test_a_name_that_hides_a_module(detkernel: Detkernel, name: str):
    result = detkernel("new-plugin", name)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: there is a Python module '{name.lower()}' (")
    assert result.stderr.endswith("); choose another name\n")


def test_a_name_that_is_taken(detkernel: Detkernel, plant: Plant):
    plant("counters", {}, plugins={"box_counter": "c:C"}, commands={"box-lister": "c:c"}, version="3.0")
    result = detkernel("new-plugin", "box-counter")
    assert (result.returncode, result.stderr) == (2, "error: counters 3.0 offers 'box_counter'; choose another name\n")
    assert detkernel("new-plugin", "box-counter", "--kind", "command").returncode == 0
    result = detkernel("new-plugin", "box-lister", "--kind", "command")
    assert (result.returncode, result.stderr) == (2, "error: counters 3.0 offers 'box-lister'; choose another name\n")


def test_a_folder_in_use(detkernel: Detkernel, folder: Path, write: Write):
    write("box-counter/mine.txt", "mine")
    result = detkernel("new-plugin", "box_counter")
    assert result.returncode == 2
    assert result.stderr == "error: box-counter exists and is not empty; choose another name, or remove it\n"
    assert os.listdir(folder / "box-counter") == ["mine.txt"]  # noqa: PTH208
    (folder / "box-counter" / "mine.txt").unlink()
    assert detkernel("new-plugin", "box_counter").returncode == 0


def test_a_file_of_that_name(detkernel: Detkernel, write: Write):
    write("box-counter", "mine")
    result = detkernel("new-plugin", "box-counter")
    assert result.returncode == 2
    assert result.stderr == "error: box-counter is a file; choose another name, or remove it\n"


def test_an_unknown_kind(detkernel: Detkernel):
    result = detkernel("new-plugin", "box-counter", "--kind", "hok")
    assert (result.returncode, result.stderr) == (2, "error: --kind: there is no kind 'hok', did you mean 'hook'?\n")


def test_a_kind_that_an_installed_distribution_offers(detkernel: Detkernel, plant: Plant, folder: Path):
    offered = """
    from detkernel.scaffold import Template
    note = Template("notes", "note", "my_plugin: {text: hello}", ("attrs>=24",))
    """
    plant(
        "notes",
        {"notes/__init__.py": offered, "notes/note.py.txt": "class MyPlugin: ...", "notes/note_test.py.txt": "x = 1"},
        templates={"note": "notes:note"},
    )
    assert "note" in detkernel("new-plugin", "--help").stdout
    result = detkernel("new-plugin", "box-counter", "--kind", "note")
    assert (result.returncode, result.stderr) == (0, "")
    assert (folder / "box-counter" / "box_counter.py").read_text() == "class BoxCounter: ..."
    assert "box_counter: {text: hello}" in (folder / "box-counter" / "README.md").read_text()
    assert '"attrs>=24"]' in (folder / "box-counter" / "pyproject.toml").read_text()


def test_a_kind_that_is_not_installed_says_where_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaffold, "kinds", lambda: KINDS)
    with pytest.raises(UserError, match=r"'model' comes with detkernel-detection, .* pip install detkernel-detection"):
        scaffold.template("model")
