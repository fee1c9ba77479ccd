"""Where a config that comes inside another file, a checkpoint say, may write: below a work dir that the user named.

A checkpoint may come from anywhere. Its own work dir is taken where the file plainly lies in it, as those of a run do;
running the command again with `run.work_dir=...` names one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePath

from detkernel.config.tree import Node
from detkernel.errors import Problem, relative


def outside(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    """(dotted path, text) of what an output option got from a checkpoint and leads out of the work dir."""
    children: list[tuple[str, Node]] = []
    if isinstance(node.value, dict):
        children = list(node.value.items())
    elif isinstance(node.value, list):
        children = [(str(index), child) for index, child in enumerate(node.value)]
    for key, child in children:
        yield from outside(child, f"{path}.{key}" if path else key)
    if isinstance(node.value, str) and node.where.foreign:
        written = PurePath(node.value)
        if written.anchor or ".." in written.parts or node.value.startswith("~"):
            yield path, node


def work_dir_problem(root: Node, work_dir: Path) -> Problem | None:
    """What is to say of a work dir that comes from a checkpoint, unless that lies in it, beside the run's config."""
    run = root.child("run")
    given = run and (run.child("work_dir") or run)
    if not given or not given.where.foreign:
        return None
    file, folder = Path(os.path.realpath(given.where.file)), Path(os.path.realpath(work_dir))
    if folder in file.parents and (folder / "config.yaml").is_file():
        return None
    around = next((parent for parent in file.parents[:2] if (parent / "config.yaml").is_file()), None)
    there = f", or run.work_dir={relative(around)} to go on where it lies" if around else ""
    message = (
        f"this comes from inside of the file, which does not lie in {relative(work_dir)}; say where the results of "
        f"this run go: run.work_dir=FOLDER{there}"
    )
    return Problem(given.where, "run.work_dir", message)
