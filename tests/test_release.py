"""All distributions have one version, and a release pins them to each other."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import detkernel
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def release() -> Any:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dependencies(text: str) -> list[str]:
    return [one for one in tomllib.loads(text)["project"]["dependencies"] if one.startswith("detkernel-")]


def test_all_have_the_version_of_the_kernel(release: Any):
    assert len(release.projects(ROOT)) > 10
    assert release.version(ROOT) == detkernel.__version__


def test_versions_that_differ_are_told(release: Any, tmp_path: Path):
    for folder, number in ((".", "1.0"), ("kernel", "1.0"), ("plugins/mine", "0.9")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "pyproject.toml").write_text(f'[project]\nversion = "{number}"\n')
    with pytest.raises(ValueError, match=r"versions differ: .*kernel 1\.0, mine 0\.9"):
        release.version(tmp_path)


def test_the_umbrella_has_every_distribution():
    names = {tomllib.loads(path.read_text())["project"]["name"] for path in ROOT.glob("plugins/*/pyproject.toml")}
    found = dependencies((ROOT / "pyproject.toml").read_text())
    assert {re.split(r"[ \[]", one)[0] for one in found} == {*names, "detkernel-kernel"}


def test_a_release_pins_every_distribution_to_the_others(release: Any):
    major, minor, _ = detkernel.__version__.split(".")
    for project in release.projects(ROOT):
        text = (project / "pyproject.toml").read_text()
        pinned = release.pinned(text, "7.8.9")
        names = [re.split(r"[ >=]", one)[0] for one in dependencies(text)]
        assert dependencies(pinned) == [f"{name}==7.8.9" for name in names]
        if project != ROOT:
            assert dependencies(text) == [f"{name}>={major}.{minor},<{major}.{int(minor) + 1}" for name in names]
