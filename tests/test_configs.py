"""Every recipe is valid, has its modeline, and what it names exists; the schema beside them is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from detkernel.config import load
from detkernel.config.read import read_text

from .conftest import Detkernel

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(CONFIGS.glob("*.yaml"))
ALL = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    config = load(path, [])
    assert {"model", "data", "optimizer", "checkpoint", "evaluation", "log"} <= set(config.plugins)
    assert config.options.work_dir.name == path.stem
    best = config.plugins["checkpoint"].best
    assert best is not None


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_editors_know_its_schema(path: Path) -> None:
    depth = len(path.relative_to(CONFIGS).parts) - 1
    assert path.read_text().splitlines()[0] == f"# yaml-language-server: $schema={'../' * depth}schema.json"


def test_the_schema_is_that_of_the_standard_plugins(detkernel_here: Detkernel) -> None:
    made = json.loads(detkernel_here("schema").stdout)
    kept = json.loads((CONFIGS / "schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(kept)
    assert kept == made, "run `detkernel schema -o configs/schema.json` with the standard plugins installed"


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(json.loads((CONFIGS / "schema.json").read_text()))


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_the_schema_takes_it(path: Path, schema: jsonschema.Draft7Validator) -> None:
    schema.validate(read_text(path.read_text(), path.name).plain())
