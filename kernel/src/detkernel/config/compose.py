"""One config from several: bases, overrides and interpolation.

Maps merge key by key; lists are replaced whole; and when a child changes `use`, the parent's other options fall away,
since they are another plugin's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import attrs

from detkernel.catalog import Catalog
from detkernel.config.dump import dump, plain
from detkernel.config.read import MAX_BYTES, MAX_DEPTH, MAX_NODES, UNUSABLE, file_text, parse_file, read_text, scalar
from detkernel.config.tree import Node, Plain, folder_of
from detkernel.config.types import default_of, option_fields
from detkernel.errors import CatalogError, ConfigError, Problem, UserError, Where, as_typed, did_you_mean, relative
from detkernel.run import RunOptions

MAX_BASES = 200
MAX_CHAIN = 50
_OWN = ("yaml", "yml")
_REFERENCE = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
_POSITION = re.compile(r"-?[0-9]{1,9}")
_PACKAGE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*):(.+)")


def compose(source: str | Path, overrides: Sequence[str] = ()) -> Node:
    """Read a config with its bases, apply `a.b=value` overrides, drop what is null, and interpolate."""
    root = _Bases().read(locate(str(source), Path.cwd()))
    for number, text in _ordered(overrides):
        root = _override(root, text, number)
    assert isinstance(root.value, dict)
    kept = {key: node for key, node in root.value.items() if node.value is not None}
    root = _Interpolation(attrs.evolve(root, value=kept)).result()
    if _size(root)[1] > MAX_DEPTH:
        raise root.error(f"nested more than {MAX_DEPTH} deep, once references and overrides are in their places")
    return root


def locate(source: str, folder: Path) -> Path:
    """The file of a path (relative to `folder`) or of `package:path`, a file shipped by an installed package."""
    match = _PACKAGE.fullmatch(source)
    if match is None or _exists(folder / source):
        return folder / source
    try:
        spec = find_spec(match[1])
    except ValueError:  # a module that was loaded without one, such as __main__
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"'{source}': there is no installed package '{match[1]}'")
    return Path(next(iter(spec.submodule_search_locations))) / match[2]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, until Python 3.13
        return False


class _Bases:
    """Reads a config and its bases, each file once, with one budget for all of them together."""

    def __init__(self) -> None:
        self._left = MAX_BYTES
        self._named = 0
        self._done: dict[Path, Node] = {}

    def read(self, path: Path, seen: tuple[Path, ...] = ()) -> Node:
        """The config of a file, merged over its bases. `seen`: the files that led here."""
        path = Path(os.path.realpath(path))  # unlike Path.resolve, it does not raise for links in a circle
        if path in seen:
            raise UserError(f"{relative(path)} is its own base: {' -> '.join(relative(p) for p in (*seen, path))}")
        if path not in self._done:
            self._done[path] = self._merged(path, (*seen, path))
        return self._done[path]

    def _merged(self, path: Path, seen: tuple[Path, ...]) -> Node:
        node = self._file(path)
        if not isinstance(node.value, dict):
            raise node.error("expected a map of plugins, such as `model: {use: NAME}`")
        merged: Node | None = None
        for item in _base_list(node.value.pop("base", None)):
            assert isinstance(item.value, str)
            self._named += 1
            if self._named > MAX_BASES:
                raise item.error(f"base: more than {MAX_BASES} of them, over all files")
            try:
                parent = self.read(locate(item.value, path.parent), seen)
            except ConfigError:
                raise
            except UserError as error:
                raise item.error(f"base: {error}") from None
            merged = parent if merged is None else _merge(merged, parent, top=True)
        return node if merged is None else _merge(merged, node, top=True)

    def _file(self, path: Path) -> Node:
        """A YAML file, or the config in a file of another kind, whose suffix is an entry point of `detkernel.configs`.

        No distribution may offer a reader of YAML: it would have a say in every run.
        """
        readers, suffix = Catalog("config"), path.suffix.removeprefix(".")
        if suffix.lower() in _OWN or suffix not in readers.entries:
            text = file_text(path)
            self._left -= len(text)
            if self._left < 0:
                raise UserError(f"{relative(path)}: with it, the config and its bases have over {MAX_BYTES} characters")
            return parse_file(path, text)
        held = readers.load_object(suffix)(path)
        try:
            _measure(held)
            node = _foreign(read_text(dump(held), as_typed(path)))
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"{relative(path)}: what it holds is not a config: {error}") from None
        if isinstance(node.value, dict) and "base" in node.value:
            raise node.value["base"].error("base: a config inside another file is whole, it has no base")
        return node


def _measure(held: object) -> None:
    """Raise ValueError for more than a config may have: a few shared lists within each other have no end."""
    todo, nodes, characters = [held], 1, 0
    while todo:
        item = todo.pop()
        if isinstance(item, (dict, list)):
            nodes += len(item)
            todo += item.values() if isinstance(item, dict) else item
            characters += sum(len(key) for key in item if isinstance(key, str)) if isinstance(item, dict) else 0
        elif isinstance(item, str):
            characters += len(item)
        if nodes > MAX_NODES or characters > MAX_BYTES:
            raise ValueError(f"more than {MAX_NODES} values, or {MAX_BYTES} characters of text")


def _foreign(node: Node) -> Node:
    """The same, marked as not from the hand of the user."""
    where = attrs.evolve(node.where, foreign=True)
    if isinstance(node.value, dict):
        return attrs.evolve(node, where=where, value={key: _foreign(child) for key, child in node.value.items()})
    if isinstance(node.value, list):
        return attrs.evolve(node, where=where, value=[_foreign(child) for child in node.value])
    return attrs.evolve(node, where=where)


def _base_list(base: Node | None) -> list[Node]:
    if base is None or base.value is None:
        return []
    items = base.value if isinstance(base.value, list) else [base]
    for item in items:
        if not isinstance(item.value, str):
            raise item.error("base: expected a file, or a list of files")
    return items


def _merge(parent: Node, child: Node, *, top: bool = False, key: str | None = None) -> Node:
    """`child` over `parent`. `key`: the top-level key, which stands for `use` where that is missing."""
    if isinstance(parent.value, str) and isinstance(child.value, dict):
        return attrs.evolve(child, over=parent)
    if not isinstance(parent.value, dict) or not isinstance(child.value, dict):
        return child
    use = child.child("use")
    if use is not None:
        before = parent.child("use") or parent.over
        if use.value != (before.value if before is not None else key):
            return child
    values = dict(parent.value)
    for name, node in child.value.items():
        values[name] = _merge(values[name], node, key=name if top else None) if name in values else node
    return Node(values, child.where, {**parent.keys, **child.keys}, over=parent.over)


def _ordered(overrides: Sequence[str]) -> list[tuple[int, str]]:
    """The arguments with their numbers, as they stand, but what chooses a plugin comes before options of that plugin:
    `optimizer.lr=1e-3 optimizer.use=adamw` would drop the rate that was given for it."""
    ordered: list[tuple[int, str]] = []
    for number, text in enumerate(overrides, start=1):
        path, _, value = text.partition("=")
        chosen = path.removesuffix(".use")
        options = [place for place, (_, other) in enumerate(ordered) if other.startswith(f"{chosen}.")]
        chooses = options and (chosen != path or _names_a_plugin(value))
        ordered.insert(options[0] if chooses else len(ordered), (number, text))
    return ordered


def _names_a_plugin(value: str) -> bool:
    try:
        node = read_text(value, "command line")
    except ConfigError:
        return False  # said when its turn comes
    return isinstance(node.value, str) or node.child("use") is not None


def _override(root: Node, text: str, number: int) -> Node:
    """Apply one `a.b.0.c=value` of the command line."""
    path, equals, value = text.partition("=")
    where = Where("command line", 1, 1, text)
    if not equals or not path or "" in path.split("."):
        raise ConfigError([Problem(where, "", f"argument {number}: expected KEY=VALUE, such as optimizer.lr=0.02")])
    if path.count(".") >= MAX_DEPTH:
        raise ConfigError([Problem(where, "", f"argument {number}: nested more than {MAX_DEPTH} deep")])
    if path == "base":
        raise ConfigError([Problem(where, "base", "only a config file has bases; write a small one that names both")])
    try:
        parsed = read_text(value, "command line")
    except ConfigError as error:
        shift = len(path) + 1
        places = [attrs.evolve(where, column=problem.where.column + shift) for problem in error.problems]
        problems = zip(error.problems, places, strict=True)
        raise ConfigError([attrs.evolve(found, where=place, path=path) for found, place in problems]) from None
    return _set(root, path.split("."), _placed(parsed, attrs.evolve(where, column=len(path) + 2)), where, ())


def _set(node: Node | None, path: list[str], value: Node, where: Where, done: tuple[str, ...]) -> Node:
    """What stands at `done`, with `value` put at `path` below it; maps merge as they do with a base."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    if node is not None and isinstance(node.value, list):
        if not _POSITION.fullmatch(key) or not -len(node.value) <= int(key) < len(node.value):
            message = f"a list of {len(node.value)}; '{key}' is not a position in it"
            raise ConfigError([Problem(where, ".".join(done), message)])
        items = list(node.value)
        items[int(key)] = _merge(items[int(key)], _set(items[int(key)], rest, value, where, (*done, key)))
        return attrs.evolve(node, value=items)
    below = _set(node.child(key) if node else None, rest, value, where, (*done, key))
    patch = Node({key: below}, where if node is None else node.where, {key: where})
    return patch if node is None else _merge(node, patch, top=not done, key=done[0] if len(done) == 1 else None)


def _placed(node: Node, where: Where) -> Node:
    """The same value, as if all of it were written at one place."""
    if isinstance(node.value, dict):
        value = {key: _placed(child, where) for key, child in node.value.items()}
        return Node(value, where, dict.fromkeys(value, where))
    if isinstance(node.value, list):
        return Node([_placed(child, where) for child in node.value], where)
    return attrs.evolve(node, where=where)


def _size(node: Node) -> tuple[int, int]:
    """(values, depth) of a node and all below it."""
    count = depth = 0
    level = [node]
    while level:
        count, depth = count + len(level), depth + 1
        below: list[Node] = []
        for item in level:
            below += item.value.values() if isinstance(item.value, dict) else ()
            below += item.value if isinstance(item.value, list) else ()
        level = below
    return count, depth


def _node(value: Plain) -> Node:
    nowhere = Where("default")
    if isinstance(value, dict):
        return Node({key: _node(item) for key, item in value.items()}, nowhere)
    return Node([_node(item) for item in value] if isinstance(value, list) else value, nowhere)


class _Interpolation:
    """`${run.seed}`, `${env:NAME}` and `${env:NAME,default}`; `$${` stands for `${` itself."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self._nodes = self._characters = 0
        self._resolved: dict[str, Node] = {}

    def result(self) -> Node:
        return self.apply(self.root, ())

    def apply(self, node: Node, active: tuple[str, ...]) -> Node:
        """The node with all references replaced. `active`: the references being resolved, to find circles."""
        if isinstance(node.value, dict):
            return attrs.evolve(node, value={key: self.apply(child, active) for key, child in node.value.items()})
        if isinstance(node.value, list):
            return attrs.evolve(node, value=[self.apply(child, active) for child in node.value])
        if not isinstance(node.value, str) or "${" not in node.value:
            return node
        whole = _REFERENCE.fullmatch(node.value)
        if whole and whole[1] is not None and not node.quoted:
            found = self._resolve(whole[1], node, active)
            self._spend(node, _size(found)[0])
            return _placed(found, node.where)
        text = _REFERENCE.sub(lambda match: self._text(match, node, active), node.value)
        return attrs.evolve(node, value=text)

    def _text(self, match: re.Match[str], node: Node, active: tuple[str, ...]) -> str:
        if match[0] == "${":
            raise node.error("a '${' without its '}'; write $${ for the text itself")
        if match[1] is None:
            return "${"
        if match[1].startswith("env:"):
            text = self._environment(match[1][4:], node)
            self._spend(node, 1, len(text))
            return text
        value = self._resolve(match[1], node, active).value
        if isinstance(value, (dict, list)):
            raise node.error(f"${{{match[1]}}} is a {'map' if isinstance(value, dict) else 'list'}, not text")
        text = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        self._spend(node, 1, len(text))
        return text

    def _spend(self, node: Node, nodes: int, characters: int = 0) -> None:
        """A few references to each other's lists or texts would otherwise have no end."""
        self._nodes += nodes
        self._characters += characters
        if self._nodes > MAX_NODES or self._characters > MAX_BYTES:
            raise node.error(f"references to more than {MAX_NODES} values, or {MAX_BYTES} characters of text")

    def _resolve(self, reference: str, node: Node, active: tuple[str, ...]) -> Node:
        if reference in active:
            raise node.error(f"${{{reference}}} refers to itself: {' -> '.join((*active, reference))}")
        if len(active) > MAX_CHAIN:
            raise node.error(f"more than {MAX_CHAIN} references that lead on to each other")
        if reference.startswith("env:"):
            return Node(scalar(self._environment(reference[4:], node)), node.where)
        if reference in self._resolved:
            return self._resolved[reference]
        found, way = self.root, list[str]()
        for part in reference.split("."):
            child = self._step(found, part) or self._default(found, part, way)
            way.append(part)
            if child is None:
                known = list(found.value) if isinstance(found.value, dict) else []
                raise node.error(f"${{{reference}}}: there is no '{part}'{did_you_mean(part, known)}")
            found = child
        self._resolved[reference] = self.apply(found, (*active, reference))
        return self._resolved[reference]

    @staticmethod
    def _step(node: Node, part: str) -> Node | None:
        if isinstance(node.value, list):
            known = _POSITION.fullmatch(part) and 0 <= int(part) < len(node.value)
            return node.value[int(part)] if known else None
        return node.child(part)

    @staticmethod
    def _default(node: Node, part: str, way: list[str]) -> Node | None:
        """The default of an option that no file gives, as the node at `way` would have it."""
        use = node.child("use")
        name = use.value if use is not None else way[0] if len(way) == 1 else None
        if not isinstance(node.value, dict) or not isinstance(name, str):
            return None
        try:
            cls = RunOptions if way == ["run"] else Catalog().load(name, folder_of(node.where))
            field = option_fields(cls).get(part)
            if field is None or field.default is attrs.NOTHING:
                return None
            return _placed(_node(plain(default_of(field), Catalog().name_of)), node.where)
        except CatalogError:
            return None  # said where the plugin itself is read

    @staticmethod
    def _environment(reference: str, node: Node) -> str:
        name, comma, default = reference.partition(",")
        text = os.environ.get(name.strip())
        if text is None:
            if not comma:
                raise node.error(
                    f"the environment variable {name} is not set; set it, or give a default: ${{env:{name},default}}"
                )
            text = default.strip()
        if UNUSABLE.search(text):
            raise node.error(f"the environment variable {name} is not UTF-8 text")
        return text
