"""Take over the bytecode that other environments of tox have: torch's takes each of them 7 s to compile.

Nothing hangs on it: Python compares the time and size of a source with those in its bytecode, and makes its own if they
differ, which is then a new file.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
from pathlib import Path


def take(theirs: Path, mine: Path) -> None:
    """Link the bytecode of all packages below a folder which the other has too."""
    for folder, inner, files in os.walk(theirs):
        place = mine / Path(folder).relative_to(theirs)
        if place.name != "__pycache__":
            if "__pycache__" not in inner and Path(folder) != theirs:
                inner.clear()  # nothing in it was ever imported
        elif place.parent.is_dir():
            place.mkdir(exist_ok=True)
            for file in files:
                if file.endswith(f".{sys.implementation.cache_tag}.pyc") and not (place / file).exists():
                    with contextlib.suppress(OSError):  # a file system without links, or somebody was faster
                        (place / file).hardlink_to(Path(folder) / file)


if __name__ == "__main__":
    packages, environment = Path(sysconfig.get_path("purelib")), Path(sys.prefix)
    for other in environment.parent.glob(f"*/{packages.relative_to(environment)}"):
        take(other, packages)
