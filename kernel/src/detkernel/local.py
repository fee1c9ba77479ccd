"""Plugins from a local file (`use: ./mine.py:MyHook`), importable in every process of a run.

A loader's worker that unpickles an object of such a class must find its module again. So a file's module is called
`detkernel.local.<the path in hexadecimal>`, and this package, imported first, knows how to find it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from detkernel.errors import CatalogError, relative

__path__: list[str] = []


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        return spec_from_file_location(name, bytes.fromhex(name.rpartition(".")[2]).decode())


sys.meta_path.append(_Finder)


def load(path: Path) -> ModuleType:
    """Import a file. Raises `CatalogError` for one that cannot be imported, with its line."""
    try:
        return importlib.import_module(f"{__name__}.{str(path).encode().hex()}")
    except SyntaxError as error:
        raise CatalogError(f"{relative(path)}:{error.lineno}:{error.offset}: {error.msg}") from None
    except ImportError as error:
        reason = str(error).strip().partition("\n")[0]
        raise CatalogError(f"{relative(path)} cannot be imported: {reason}") from error


def file_of(module: str) -> str:
    """The file of a module made here; empty for any other module."""
    name = module.removeprefix(f"{__name__}.")
    return "" if name == module else bytes.fromhex(name).decode()


def source_of(module: str) -> str:
    """The file of a module made here, for messages; any other module's name as it is."""
    file = file_of(module)
    return relative(file) if file else module
