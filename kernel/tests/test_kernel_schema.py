"""The JSON Schema of configs: valid itself, and of one mind with the loader wherever one file tells."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from detkernel import ConfigError
from detkernel.catalog import Catalog
from detkernel.config import load
from detkernel.config.read import read_text
from detkernel.config.schema import config_schema
from jsonschema import Draft7Validator

Plant = Callable[..., Path]
Write = Callable[[str, str], Path]
Detkernel = Callable[..., subprocess.CompletedProcess[str]]

GARDEN = '''
"""Plugins for the tests of the schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from detkernel import Part, Span, option, plugin


class Plant(Part):
    """What grows."""


@plugin
class Soil:
    """What it grows in."""

    acid: float = option(default=7.0, at_least=0, at_most=14, help="the pH")


@plugin
class Tree(Plant):
    """A tall one."""

    height: float = option(above=0, below=120, help="in metres")
    soil: Soil = option(factory=Soil, help="its soil")


@plugin
class Bed(Plant):
    """Several, side by side."""

    plants: list[Plant] = option(help="what is in it")


@plugin
class Garden:
    """A garden, with a wall around it."""

    main: Plant | None = option(default=None, help="the first to see")
    size: tuple[int, int] = option(default=(3, 4), help="width and depth")
    colours: tuple[float, ...] = option(default=(), help="any number of them")
    every: Span = option(default=Span(1, "epochs"), help="how often it is watered")
    fence: Literal["none", "wood", 3] = option(default="none", help="around it")
    open: bool = option(default=True, help="to visitors")
    beds: list[int] = option(factory=list, at_least=1, help="how many of each")
    map: Path = option(default=Path("map.png"), help="an image of it")
    prices: dict[str, float] = option(factory=dict, help="of each kind")
    extra: Any = option(default=None, help="anything else")
    kind: str = option(default="a", choices=("a", "b"), help="which")
    limit: float = option(default=float("inf"), help="of visitors")
    owner: str | None = option(default=None, help="whose it is")
'''


@pytest.fixture(autouse=True)
def garden(plant: Plant) -> None:
    names = {name: f"garden_one:{name.capitalize()}" for name in ("garden", "tree", "bed")}
    plant("garden", {"garden_one.py": GARDEN}, plugins=names)


@pytest.fixture
def schema(garden: None) -> dict[str, Any]:
    return config_schema(Catalog())


def test_it_is_a_schema_of_draft_7(schema: dict[str, Any]):
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    Draft7Validator.check_schema(schema)
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


GOOD = [
    "garden: {}",
    "garden: null",
    "garden: {priority: low}",
    "g: {use: garden, size: [1, 2], priority: highest}",
    "garden: {main: {use: tree, height: 3}}",
    "garden: {main: {use: tree, height: 3, soil: {acid: 6}}}",
    "garden: {main: {use: bed, plants: [{use: tree, height: 1}, {use: bed, plants: []}]}}",
    "garden: {main: null, owner: null}",
    "garden: {owner: me, kind: b, open: false, fence: 3, limit: .5, map: a/b.png}",
    "garden: {every: 12 epochs}",
    "garden: {every: every 1 iter}",
    "garden: {every: 90_000 iterations}",
    "garden: {colours: [1, 2.5, 3], beds: [1, 2], prices: {rose: 1, oak: 2.5}, extra: {a: [1, x]}}",
    "garden: {limit: .inf}",
    "garden:\n  open: ${env:NOWHERE,true}",
    "garden: {use: ./mine.py:Mine, anything: goes}",
    "garden: {main: ./mine.py:MyPlant}",
    "garden: {main: {use: ./mine.py:MyPlant, leaves: 3}}",
]
BAD = [
    "garden: 3",
    "garden: []",
    "garden: {sizes: [1, 2]}",
    "garden: {size: [1]}",
    "garden: {size: [1, 2, 3]}",
    "garden: {size: [1, 2.5]}",
    "garden: {every: 12}",
    "garden: {every: 12 weeks}",
    "garden: {every: epochs}",
    "garden: {fence: steel}",
    "garden: {fence: '3'}",
    "garden: {open: yes}",
    "garden: {open: 1}",
    "garden: {beds: [0]}",
    "garden: {beds: 3}",
    "garden: {map: 3}",
    "garden: {prices: {rose: cheap}}",
    "garden: {kind: c}",
    "garden: {limit: high}",
    "garden: {owner: 3}",
    "garden: {main: 3}",
    "garden: {main: nowhere}",
    "garden: {main: {use: nowhere}}",
    "garden: {main: {use: garden}}",
    "garden: {main: {use: tree, height: 0}}",
    "garden: {main: {use: tree, height: 120}}",
    "garden: {main: {use: tree, hight: 3}}",
    "garden: {main: {use: tree, height: 3, soil: {acid: 15}}}",
    "garden: {main: {use: tree, height: 3, priority: low}}",
    "garden: {main: {use: bed, plants: [{use: tree, height: x}]}}",
    "garden: {priority: soon}",
    "g: {use: nowhere}",
    "g: {use: tree, height: 3}",
    "g: {use: garden, sizes: 3}",
    "g: 3",
    "run: {until: 12}",
    "run: {until: 1 epoch, seeds: 3}",
    "run: {until: 1 epoch, seed: -1}",
    "run: {until: 1 epoch, workflow: [[train, 1], [sleep, 1]]}",
]
MINE = """
from typing import Any
from detkernel import option, plugin
from garden_one import Plant

@plugin
class Mine:
    "Mine."
    anything: Any = option(default=None, help="h")

@plugin
class MyPlant(Plant):
    "My own."
    leaves: int = option(default=0, help="h")
"""


def written(text: str) -> str:
    return text if text.startswith("run:") else f"run: {{until: 1 epoch}}\n{text}\n"


@pytest.mark.parametrize("text", GOOD)
def test_what_loads_passes(schema: dict[str, Any], write: Write, text: str):
    write("mine.py", MINE)
    write("c.yaml", written(text))
    load("c.yaml")
    errors = list(Draft7Validator(schema).iter_errors(read_text(written(text), "c.yaml").plain()))
    assert errors == []


@pytest.mark.parametrize("text", BAD)
def test_what_does_not_load_fails(schema: dict[str, Any], write: Write, text: str):
    write("c.yaml", written(text))
    with pytest.raises(ConfigError):
        load("c.yaml")
    assert not Draft7Validator(schema).is_valid(read_text(written(text), "c.yaml").plain())


def test_what_another_file_may_give_is_not_required(schema: dict[str, Any]):
    assert Draft7Validator(schema).is_valid({"base": ["a.yaml"], "garden": {"main": {"use": "tree"}}})
    assert Draft7Validator(schema).is_valid({"base": "a.yaml", "garden": {"main": {"soil": {"acid": 3}}}})


def test_everything_is_described(schema: dict[str, Any]):
    garden = schema["definitions"]["plugin:garden"]
    assert garden["description"] == "A garden, with a wall around it."
    assert garden["properties"]["size"]["description"] == "width and depth"
    assert garden["properties"]["size"]["default"] == [3, 4]
    assert garden["properties"]["every"]["default"] == "1 epoch"
    assert "default" not in garden["properties"]["limit"]
    options = [node for node in _objects(schema) if "description" in node and "properties" in node]
    assert {"What it grows in.", "A tall one.", "Several, side by side."} < {node["description"] for node in options}
    for node in options:
        for name, option in node["properties"].items():
            assert name == "use" or option.get("description"), f"{name} of {node['description']}"


def _objects(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [found for item in node for found in _objects(item)]
    if not isinstance(node, dict):
        return []
    return [node, *(found for item in node.values() for found in _objects(item))]


class TestCommand:
    def test_it_prints_the_schema(self, detkernel: Detkernel, schema: dict[str, Any]):
        result = detkernel("schema")
        assert (result.returncode, result.stderr) == (0, "")
        assert json.loads(result.stdout) == schema

    def test_or_writes_it(self, detkernel: Detkernel, folder: Path, schema: dict[str, Any]):
        assert detkernel("schema", "-o", "new/schema.json").returncode == 0
        assert json.loads((folder / "new" / "schema.json").read_text()) == schema

    def test_a_place_that_cannot_be_written(self, detkernel: Detkernel, write: Write):
        write("file", "x")
        result = detkernel("schema", "-o", "file/schema.json")
        assert result.returncode == 2
        assert result.stderr.startswith("error: file/schema.json: cannot be written: ")
        assert result.stderr.count("\n") == 1

    def test_a_plugin_that_cannot_be_loaded_is_left_out_and_named(self, detkernel: Detkernel, plant: Plant):
        plant("broken", {"broken_two.py": "import no_such_thing\n"}, plugins={"broken": "broken_two:X"})
        result = detkernel("schema")
        assert result.returncode == 0
        made = json.loads(result.stdout)
        assert "garden" in made["properties"]
        assert "broken" not in made["properties"]
        assert result.stderr.startswith("left out: plugin 'broken' of broken 1.0 cannot be imported")
        assert made["$comment"] == result.stderr.strip()

    @pytest.mark.parametrize(
        ("number", "source", "reason"),
        [
            (
                1,
                "class X: ...\n",
                "plugin 'invalid' of invalid 1.0: site/invalid_1.py:3: X: a plugin needs a docstring",
            ),
            (
                2,
                "class X:\n    'X.'\n    a: No = option(help='a')\n",
                "plugin 'invalid' of invalid 1.0 (invalid_2:X): invalid_2:X.a is annotated with `No`",
            ),
            (
                3,
                "class X:\n    'X.'\n1 / 0\n",
                "plugin 'invalid' of invalid 1.0 cannot be imported: ZeroDivisionError(",
            ),
        ],
    )
    def test_so_is_an_invalid_one(self, detkernel: Detkernel, plant: Plant, number: int, source: str, reason: str):
        head = "from __future__ import annotations\nfrom detkernel import option, plugin\n@plugin\n"
        plant("invalid", {f"invalid_{number}.py": head + source}, plugins={"invalid": f"invalid_{number}:X"})
        result = detkernel("schema")
        assert result.returncode == 0
        assert result.stderr.startswith(f"left out: {reason}")
        assert "garden" in json.loads(result.stdout)["properties"]
