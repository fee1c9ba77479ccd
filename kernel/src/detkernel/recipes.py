"""The recipes that installed packages ship: folders of configs, named by entry points of `detkernel.recipes`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from detkernel.catalog import Catalog
from detkernel.errors import UserError, as_typed, did_you_mean, relative
from detkernel.files import write_atomic
from detkernel.terminal import rows, styled

_BASE = re.compile(r"^base:.*$", re.MULTILINE)
_FILE = re.compile(r"[^\s\[\],\"']+\.yaml")


def recipe_list() -> str:
    """Every recipe by package: its name, and what the comment at its head says first, with the published AP."""
    parts = []
    for place, folder in _places():
        found = [(path.stem, _brief(_comment(path))) for path in sorted(folder.glob("*.yaml"))]
        parts.append(f"{styled(place, bold=True)}\n{rows(found, '  ')}")
    none = "no recipes are installed; `pip install detkernel` brings the standard ones\n"
    return "\n".join(parts) or none


def copy(name: str, target: Path | None) -> Path:
    """Write a recipe to a new file (in a folder: under its own name), and return its path. Its bases stay where they
    are: the copy names them by package. Raises `UserError` for one that is not there, or a file that is."""
    name = name.removesuffix(".yaml")
    found = {path.stem: (place, path) for place, folder in _places() for path in folder.glob("*.yaml")}
    if name not in found:
        raise UserError(f"there is no recipe '{name}'{did_you_mean(name, found)}; `detkernel recipes` lists them")
    place, path = found[name]
    target = target / path.name if target and target.is_dir() else target or Path(path.name)
    if target.exists():
        raise UserError(f"{relative(target)} is there already; give another name: detkernel recipes {name} FILE")
    text = _BASE.sub(
        lambda line: _FILE.sub(lambda base: _named(base[0], place, path), line[0]), path.read_text("utf-8")
    )
    lines = [line for line in text.splitlines(keepends=True) if "yaml-language-server" not in line]
    write_atomic(target, "".join(lines))
    return target


def _places() -> Iterator[tuple[str, Path]]:
    """(package, its folder); `configs` of a checkout that is worked in, where no package of it is installed."""
    catalog = Catalog("recipe")
    none = True
    for name in catalog.entries:
        spec = find_spec(catalog.find(name).target)
        for folder in (spec.submodule_search_locations or ())[:1] if spec else ():
            none = False
            yield catalog.find(name).target, Path(folder)
    if none and Path("configs").is_dir():
        yield "configs", Path("configs")


def _named(base: str, place: str, path: Path) -> str:
    """A base as a config elsewhere may name it."""
    if ":" in base:
        return base
    if path.parent == Path(place):  # of a checkout
        return as_typed(path.parent / base)
    return f"{place}:{base}"


def _brief(comment: str) -> str:
    """The first sentence, and the one that says what was published."""
    first, *others = re.split(r"(?<=[.;]) (?=[A-Z\d])", re.sub(r"\bal\. ", "al.\0", comment))
    kept = [first, *(text for text in others if text.startswith("Published"))]
    return " ".join(kept).replace("al.\0", "al. ").rstrip(";.") + "."


def _comment(path: Path) -> str:
    """The first comment of a file, but for what editors read."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("#") and "yaml-language-server" not in line:
            lines.append(line.lstrip("# "))
        elif lines or not line.startswith("#"):
            break
    return " ".join(lines)
