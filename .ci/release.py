"""Builds the wheels of a release into a folder, each pinned to the others' version: `python .ci/release.py dist`.

In the repository, distributions depend on a minor version of each other (`>=0.1,<0.2`), and the umbrella `detkernel` on
the folders beside it. In a release both become `==` the one version that all of them have. `requirements.txt` beside
the wheels lists them by path, so that none of them is looked up in an index.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def projects(root: Path) -> list[Path]:
    """The folders of all distributions: the umbrella, the kernel, the plugins."""
    return [root, root / "kernel", *sorted(path.parent for path in root.glob("plugins/*/pyproject.toml"))]


def version(root: Path) -> str:
    """The version that all of them have. Raises ValueError where they differ."""
    texts = {path: (path / "pyproject.toml").read_text() for path in projects(root)}
    found = {path: tomllib.loads(text)["project"]["version"] for path, text in texts.items()}
    if len(set(found.values())) > 1:
        raise ValueError(f"versions differ: {', '.join(f'{path.name} {number}' for path, number in found.items())}")
    return str(found[root])


def pinned(text: str, number: str) -> str:
    """A pyproject.toml whose dependencies on the project's own distributions are `==` a version."""
    return re.sub(r'"(detkernel-\w+(?:\[\w+\])?)(?:>=[^"]*| @ [^"]*)"', rf'"\1=={number}"', text)


def build(folder: Path) -> list[Path]:
    """Build every wheel; the repository is left as it is."""
    number = version(ROOT)
    with tempfile.TemporaryDirectory() as copied:
        root = Path(copied) / "detkernel"
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, root / name)
        for project in projects(root):
            file = project / "pyproject.toml"
            file.write_text(pinned(file.read_text(), number))
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
        subprocess.run([*command, *map(str, projects(root))], check=True)
    return sorted(folder.glob("*.whl"))


if __name__ == "__main__":
    target = Path(sys.argv[1]).resolve()
    shutil.rmtree(target, ignore_errors=True)
    wheels = build(target)
    (target / "requirements.txt").write_text("".join(f"{wheel}\n" for wheel in wheels))
    print(*(wheel.name for wheel in wheels), sep="\n")
