"""The config that a checkpoint holds: `detkernel test runs/mine/checkpoints/iter_900.pt` needs no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detkernel import CheckpointError
from detkernel.errors import relative


def config(path: Path) -> dict[str, Any]:
    """The config of a checkpoint's run, which tests this very checkpoint, or goes on from it.

    Raises CheckpointError for a file that is not a valid checkpoint, or is of a run without a config.
    """
    from detkernel_checkpoint import checkpoint_file

    held = checkpoint_file.read(path)["provenance"].get("config")
    parts = held.items() if isinstance(held, dict) else ()
    used = [key for key, part in parts if isinstance(part, dict) and part.get("use", key) == "checkpoint"]
    if not isinstance(held, dict) or len(used) != 1:
        raise CheckpointError(f"{relative(path)}: holds no config with the checkpoint plugin; give a YAML file")
    return {**held, used[0]: {**held[used[0]], "resume": str(path), "load_from": None}}
