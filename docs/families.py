"""mkdocs hook: the model zoo, and a page for each family of native detectors, made of its class, its recipes and its
weights' names."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detkernel.catalog import Catalog
from detkernel.config.types import default_of, is_base, members, option_fields, option_type
from detkernel.plugin import Part
from detkernel.reference import option_rows
from detkernel_detectors.models.dense import BaseDetector
from detkernel_detectors.zoo import ZOO

CONFIGS = Path(__file__).parents[1] / "configs"


class Recipe(NamedTuple):
    """A config of `configs/` that trains a family as published."""

    name: str
    family: str
    said: str
    """The comment at its head, which names the paper, the schedule, and the published AP with its source."""
    text: str
    """What follows."""

    @property
    def published(self) -> tuple[str, str, str] | None:
        """Who published, the AP of boxes, and that of masks or an empty text."""
        found = re.search(r"Published by (.*?)(?:, with .*?)?: box AP ([\d.]+?)\.?(?:[,; ]|$)", self.said)
        masks = re.search(r"mask AP ([\d.]+\d)", self.said)
        return None if found is None else (found[1], found[2], masks[1] if masks else "")


def on_config(config: Any) -> Any:
    """Put the pages behind their index in the navigation."""
    for row in config["nav"] or []:
        for title, target in dict(row).items() if isinstance(row, Mapping) else ():
            if target == "families/index.md":
                row[title] = [{"All families": target}, *({name: f"families/{name}.md"} for name in families())]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site."""
    from mkdocs.structure.files import File

    for path, lines in pages():
        files.append(File.generated(config, path, content="\n".join(lines) + "\n"))
    return files


def pages() -> Iterator[tuple[str, Iterator[str]]]:
    """Path and lines of each page."""
    made = recipes()
    found = families()
    yield "zoo.md", zoo_page()
    yield "families/index.md", index(found, made)
    for name, cls in found.items():
        yield f"families/{name}.md", page(name, cls, [one for one in made if one.family == name])


@functools.cache
def families() -> dict[str, type[BaseDetector]]:
    """Every installed family of native detectors, by its name in a config."""
    catalog = Catalog()
    loaded = {name: catalog.load(name) for name in catalog.entries}
    return {name: cls for name, cls in sorted(loaded.items()) if issubclass(cls, BaseDetector)}


def recipes() -> list[Recipe]:
    """The configs that train a native detector on COCO."""
    found = []
    for path in sorted(CONFIGS.glob("coco_*.yaml")):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "yaml-language-server" not in line]
        head = [line.removeprefix("# ") for line in lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")]]
        found.append(Recipe(path.name, _family(path), " ".join(head), "\n".join(lines[len(head) :])))
    return found


def _family(path: Path) -> str:
    """Which model a config uses, itself or through its bases."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "use" in content.get("model", {}):
        return str(content["model"]["use"])
    bases = content.get("base", [])
    return next(
        filter(None, (_family(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases))), ""
    )


def index(found: Mapping[str, type[BaseDetector]], made: list[Recipe]) -> Iterator[str]:
    """The table of all families."""
    yield "# Detectors\n"
    yield "Each family is made of parts, which a config replaces; its page lists them, with its recipes. The published"
    yield "AP is what a recipe's authors, or MMDetection's, reached with it on COCO's val2017: somebody else's number,"
    yield "and not one that was measured here.\n"
    yield "| family | what it is | published box AP | mask AP | by |\n|---|---|---|---|---|"
    for name, cls in found.items():
        what = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
        published = [one.published for one in made if one.family == name and one.published is not None]
        boxes, masks = (", ".join(one[place] for one in published if one[place]) for place in (1, 2))
        by = ", ".join(dict.fromkeys(one[0] for one in published))
        yield f"| [`{name}`]({name}.md) | {what} | {boxes} | {masks} | {by} |"


def zoo_page() -> Iterator[str]:
    """Every recipe, by the comment at its head."""
    yield "# Model zoo\n"
    yield (
        "Every recipe, with the average precision that its authors or MMDetection published for it, and what was "
        "measured with detkernel. `detkernel recipes NAME` copies one, and `detkernel run` takes the copy.\n"
    )
    yield "| recipe | what it trains | published AP | measured AP |\n|---|---|---|---|"
    coco = {one.name: one.family for one in recipes()}
    measured = yaml.safe_load((CONFIGS.parent / "docs/measured.yaml").read_text(encoding="utf-8"))
    for path in sorted(CONFIGS.glob("*.yaml")):
        text, published = _said(path)
        what = re.sub(r"https?://\S+", r"<\g<0>>", _cell(text))
        family = coco.get(path.name)
        name = f"[`{path.stem}`](families/{family}.md#recipe-{path.stem}yaml)" if family else f"`{path.stem}`"
        yield f"| {name} | {what} | {published} | {measured.get(path.stem, '')} |"
    yield (
        "\nNative detectors are held against MMDetection's or their authors' numbers in the tests: equal feature maps, "
        "losses, gradients and detections for equal weights (see [the package](packages/detectors.md)). A whole "
        "COCO training has not been run with them yet; where it has, the AP is in the last column.\n"
    )


def _said(path: Path) -> tuple[str, str]:
    """What the comment at the head of a recipe says, and what was published, in it."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line.lstrip("# ") for line in lines[:6] if line.startswith("#") and "yaml-language" not in line)
    what, _, published = comment.partition("Published by ")
    found = re.findall(r"(box AP|mask AP|mAP) (\d+\.\d)", published)
    shown = {"box AP": "", "mask AP": "masks ", "mAP": "VOC's mAP "}
    return what.strip().rstrip("."), ", ".join(shown[kind] + ap for kind, ap in found)


def page(name: str, cls: type[BaseDetector], made: list[Recipe]) -> Iterator[str]:
    """One family: what it is, its recipes, its parts, its options, and the weights that load into it."""
    yield f"# {name}\n\n{_linked(inspect.getdoc(cls) or '')}\n"
    file = cls.__module__.replace(".", "/")
    yield f"In a config: `model: {{use: {name}}}`. The method is in one file, `{file}.py`.\n"
    if made:
        yield "## Published\n"
        yield "On COCO's val2017; somebody else's numbers, with the schedule of the recipe.\n"
        masked = any(recipe.published and recipe.published[2] for recipe in made)
        yield f"| recipe | box AP |{' mask AP |' * masked} published by |\n|---|---|---|{'---|' * masked}"
        for recipe in made:
            by, boxes, masks = recipe.published or ("", "", "")
            row = f"| `detkernel run detkernel_configs:{recipe.name}` | {boxes} |"
            yield f"{row}{f' {masks} |' * masked} {by} |"
        yield ""
    yield "## Parts\n\nEach is replaced by `use:`, with an installed part or one of [your own](../parts.md).\n"
    yield "| option | what it does | default | others |\n|---|---|---|---|"
    for option, kind, default, text in parts_of(cls):
        others = ", ".join(f"`{one}`" for one in kinds()[kind] if one != default)
        yield f"| `{option}` | {text} | `{default}` | {others} |"
    yield "\n## Options\n\n| option | type | default | meaning |\n|---|---|---|---|"
    held = {option for option, *_ in parts_of(cls)}
    for option, kind_text, default, meaning in option_rows(cls):
        if option not in held:
            yield f"| `{option}` | `{_cell(kind_text)}` | `{_cell(default)}` | {_cell(meaning)} |"
    yield from _weights(name, cls)
    for recipe in made:
        yield f"\n## Recipe `{recipe.name}`\n\n{_linked(recipe.said)}\n\n```yaml\n{recipe.text}\n```"


def parts_of(cls: type[BaseDetector]) -> Iterator[tuple[str, str, str, str]]:
    """(option, kind of part, name of its default, help) of each option that is a part."""
    for name, field in option_fields(cls).items():
        kind = next((one for one in members(option_type(cls, name)) if is_base(one)), None)
        if kind is not None:
            default = default_of(field)
            used = "null" if default is None else _names().get(type(default), type(default).__name__)
            yield name, kind.__name__, used, _cell(field.metadata["help"])


@functools.cache
def kinds() -> dict[str, list[str]]:
    """Kind of part -> the names of the installed parts of it."""
    found: dict[str, list[str]] = {}
    for cls, name in _names().items():
        for base in cls.__mro__:
            if is_base(base) and base is not Part:
                found.setdefault(base.__name__, []).append(name)
    return found


@functools.cache
def _names() -> dict[type[Any], str]:
    catalog = Catalog()
    loaded = {name: catalog.load(name) for name in catalog.entries}
    return {cls: name for name, cls in loaded.items() if issubclass(cls, Part)}


def _weights(name: str, cls: type[BaseDetector]) -> Iterator[str]:
    """The names of published weights."""
    longest = sorted(families(), key=len, reverse=True)
    own = [
        config
        for config in ZOO
        if next((one for one in longest if re.match(one.replace("_", "-") + "[-_]", config)), "") == name
    ]
    published = [*(f"`mmdet:{config}`" for config in own)]
    published += [f"`torchvision:COCO_V1`, of `{builder}`" for builder in cls.torchvision_builders]
    yield f"\n## Weights\n\nThose of {cls.published_by} load by their names of parameters: `model: {{weights: FILE}}`."
    if published:
        yield "Downloaded by name, as `model: {weights: NAME}`, with the options of their config:\n"
        yield from (f"- {one}" for one in published)


def _linked(text: str) -> str:
    return re.sub(r"https?://[^\s,;)]*[^\s,;).:]", lambda match: f"<{match[0]}>", text)


def _cell(text: str) -> str:
    return text.replace(" | ", " or ").replace("|", "/").replace("\n", " ")
