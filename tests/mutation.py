"""Change the code one place at a time, and see whether a test notices: `python tests/mutation.py optim --sample 100`.

The tests of a plugin (or of the kernel) run once under coverage, which tells the tests that reach each line. Then each
mutant (a copy of the tree with one operator, number, condition or keyword argument changed) runs only the tests that
reach its line, in a process forked from one that has imported torch already. A mutant that every such test passes has
survived: there a fault would go unnoticed. Lines that only child processes reach are counted apart.

This is not part of the test suite: it takes minutes for a hundred mutants. Survivors are printed with their lines, most
of them equal to the original for a good reason (a message, a limit that is never met, a faster way to the same value).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def changeable(source: str) -> list[tuple[int, int]]:
    """(number of a node, kind of change) of each place that can be changed."""
    nodes = enumerate(ast.walk(ast.parse(source)))
    return [(number, kind) for number, node in nodes for kind in range(2) if _change(copy.deepcopy(node), kind)]


def mutant(source: str, number: int, kind: int) -> tuple[int, str, str]:
    """(line, what was changed, the whole changed source)."""
    tree = ast.parse(source)
    node = next(node for position, node in enumerate(ast.walk(tree)) if position == number)
    line, before = getattr(node, "lineno", 0), _shown(node)
    _change(node, kind)
    return line, f"{before}  ->  {_shown(node)}", ast.unparse(tree)


def _shown(node: ast.AST) -> str:
    try:
        return ast.unparse(node).splitlines()[0][:90]
    except (AttributeError, ValueError, IndexError):
        return type(node).__name__


def _change(node: ast.AST, kind: int) -> bool:
    """Change a node in place, in one of two ways; False where there is nothing to change."""
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS and kind == 0:
        node.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS and kind == 0:
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and kind == 0:
        node.value = node.value + 1
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool) and kind == 0:
        node.value = not node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and kind == 0:
        node.op = ast.UAdd()
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)) and not isinstance(node.test, ast.Constant):
        node.test = ast.Constant(value=kind == 0)
    elif isinstance(node, ast.Call) and node.keywords and kind == 1 and _name(node.func) != "option":
        node.keywords.pop()
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS and kind == 0:
        node.op = SWAPS[type(node.op)]()
    else:
        return False
    return True


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def reached(tests: Path, package: Path, folder: Path) -> dict[str, dict[int, list[str]]]:
    """Of each file, by line: the tests that reach it. Raises SystemExit where they do not pass as they are."""
    settings, data = folder / "coveragerc", folder / "coverage"
    settings.write_text(f"[run]\nsource = {package}\ndata_file = {data}\n")
    plugin = folder / "contexts.py"
    plugin.write_text(
        "import coverage, pytest\n"
        "@pytest.hookimpl(wrapper=True)\n"
        "def pytest_runtest_protocol(item):\n"
        "    coverage.Coverage.current().switch_context(item.nodeid)\n"
        "    return (yield)\n"
    )
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-q", "-p", "contexts"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    subprocess.run([*command, "-p", "no:cacheprovider", str(tests)], cwd=ROOT, env=environment, check=True)
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    coverage = importlib.import_module("coverage")
    with contextlib.closing(sqlite3.connect(data)) as base:
        rows = base.execute(
            "select path, context, numbits from line_bits join file on file.id = file_id "
            "join context on context.id = context_id"
        ).fetchall()
    for path, context, bits in rows:
        for line in coverage.numbits.numbits_to_nums(bits):
            if context:
                found[path][line].append(context)
    return found


def survives(tree: Path, tests: list[str], seconds: int) -> bool:
    """Whether all these tests pass in a forked process."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(tree)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        pytest = importlib.import_module("pytest")
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plugin", help="a folder of plugins/, or 'kernel'")
    parser.add_argument("--sample", type=int, default=100, help="mutants that are tried, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60, help="a mutant that takes longer counts as noticed")
    parser.add_argument("--only", default="", help="only files whose path contains this")
    given = parser.parse_args()
    home = ROOT / ("kernel" if given.plugin == "kernel" else f"plugins/{given.plugin}")
    package = home / ("src/detkernel" if given.plugin == "kernel" else f"detkernel_{given.plugin}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        lines = reached(home / "tests", package, folder)
        tree = folder / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        places = [tree / "kernel/src", *(path for path in (tree / "plugins").iterdir() if path.is_dir())]
        sys.path[:0] = map(str, places)
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, places))
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        for name in ("torch", "torchvision", "pytest", "numpy") if given.plugin != "kernel" else ("pytest",):
            importlib.import_module(name)
        files = [path for path in sorted(package.rglob("*.py")) if given.only in str(path)]
        every = [(path, *place) for path in files for place in changeable(path.read_text())]
        drawn = random.Random(given.seed).sample(every, min(given.sample, len(every)))
        chosen = [(path, *mutant(path.read_text(), *place)) for path, *place in drawn]
        print(f"{len(every)} mutants, {len(chosen)} tried", flush=True)
        counts: dict[str, int] = defaultdict(int)
        for path, line, what, source in sorted(chosen, key=lambda item: (str(item[0]), item[1])):
            here = lines.get(str(path), {})
            tests = here.get(line) or sorted({test for there in here.values() for test in there})  # reached on import
            copied = tree / path.relative_to(ROOT)
            if not tests:
                verdict = "not reached"
            else:
                copied.write_text(source)
                verdict = "SURVIVED" if survives(tree, tests, given.seconds) else "noticed"
                shutil.copy(path, copied)
            counts[verdict] += 1
            if verdict != "noticed":
                print(f"{verdict}: {path.relative_to(ROOT)}:{line}: {what}", flush=True)
        print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))


if __name__ == "__main__":
    main()
