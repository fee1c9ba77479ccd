"""A checkpoint file: what `torch.save` writes, with a checksum in the comment of its zip archive.

Any `torch.load(path, weights_only=True)` reads it. The checksum covers every byte before the comment, so that a file
cut short or damaged anywhere is distinguished from a valid one. It does not protect against forgery, so it need only be
fast: SHA-256 was two thirds of what a save takes from training. A file is written beside its place, flushed to the disk
and renamed.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from detkernel import CheckpointError
from detkernel.errors import relative
from detkernel.files import open_regular
from detkernel_detection import tensor_file
from xxhash import xxh3_128

FORMAT = 1
TEMPORARY = ".tmp"

_MARK = b"detkernel checkpoint xxh3_128 "
_SEAL = len(_MARK) + 32
_END = 22
"""Bytes of a zip archive's last record without its comment; the last two are the comment's length."""
_CHUNK = 1 << 20
_FORM = {"position": dict, "model": dict, "modules": dict, "plugins": dict, "ranks": list, "provenance": dict}
_PLAIN = ("position", "classes", "keypoints", "provenance")
_MOST = 2**53
_COUNTS = ("epoch", "iter", "batch", "validated", "epoch_length")


class OtherFormatError(CheckpointError):
    """A valid checkpoint that another version of this package wrote."""


class _Sealed:
    """A file for `torch.save` that hashes what goes through, and keeps the first error.

    torch turns an error raised in `write` into one of its own, without the errno; so it is kept here, and what follows
    is dropped.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._held = file, xxh3_128(), b""
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._out(self._held)
        self._out(memoryview(data)[:-_END])
        self._held = bytes(memoryview(data)[-_END:])
        return len(data)

    def flush(self) -> None:
        """Called by torch when it is done; there is nothing to do before the seal."""

    def seal(self) -> None:
        """Write the archive's last record, with the checksum as its comment. Raises the first error there was."""
        self._out(self._held[:-2] + struct.pack("<H", _SEAL))
        if self.error is None:
            self._file.write(_MARK + self._digest.hexdigest().encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        if self.error is not None:
            raise self.error

    def _out(self, data: bytes | memoryview) -> None:
        if self.error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
            except OSError as error:
                self.error = error


def write(path: Path, payload: object) -> None:
    """Write a checkpoint: afterwards it is whole, and on the disk. Raises OSError, and then leaves nothing behind."""
    beside = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        beside.unlink(missing_ok=True)
        with beside.open("xb") as file:  # not through a link that bears its name
            sealed = _Sealed(file)
            torch.save(payload, sealed)  # type: ignore[arg-type]
            sealed.seal()
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the renaming itself on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def verify(path: Path) -> None:
    """Raise CheckpointError, with the reason, unless this is a checkpoint with every byte as it was written."""
    shown = relative(path)
    try:
        with open_regular(path) as file:
            body = file.seek(0, os.SEEK_END) - _SEAL
            if body < _END:
                raise CheckpointError(f"{shown}: torn, or no checkpoint: it has only {body + _SEAL} bytes")
            file.seek(body)
            seal = file.read(_SEAL)
            if not seal.startswith(_MARK):
                raise CheckpointError(f"{shown}: torn, or no checkpoint of a run: it does not end with a checksum")
            file.seek(0)
            digest = xxh3_128()
            while body > 0 and (chunk := file.read(min(_CHUNK, body))):
                digest.update(chunk)
                body -= len(chunk)
    except OSError as error:
        raise CheckpointError(f"{shown}: cannot be read: {error.strerror}") from None
    if digest.hexdigest().encode() != seal[len(_MARK) :]:
        raise CheckpointError(f"{shown}: damaged: its checksum does not fit its content")


def load(path: Path) -> Any:
    """The content of any file of `torch.save`, on the CPU. Never runs code from it; raises CheckpointError."""
    return tensor_file.read(path)


def read(path: Path) -> dict[str, Any]:
    """A whole checkpoint of a run. Raises CheckpointError unless it is valid and of a form that is known."""
    verify(path)
    content = load(path)
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise CheckpointError(f"{relative(path)}: no checkpoint of a run")
    if content["format"] != FORMAT:
        found = content["format"]
        raise OtherFormatError(
            f"{relative(path)}: has format {found}, this detkernel reads {FORMAT}; use the one that wrote it"
        )
    for name, kind in _FORM.items():
        if not isinstance(content.get(name), kind):
            raise CheckpointError(f"{relative(path)}: '{name}' is missing or is not a {kind.__name__}")
    if not isinstance(content.get("training_model"), (dict, type(None))):
        raise CheckpointError(f"{relative(path)}: 'training_model' is not a dict")
    for name in _PLAIN:
        if not _is_plain(content.get(name)):
            raise CheckpointError(f"{relative(path)}: '{name}' holds more than plain values")
    counts = [content["position"].get(name) for name in _COUNTS]
    if not all(type(count) is int and 0 <= count < _MOST for count in counts) or counts[-1] == 0:
        raise CheckpointError(f"{relative(path)}: its position is none: {dict(zip(_COUNTS, counts, strict=True))}")
    if not _is_metrics(content["position"].get("metrics")):
        raise CheckpointError(f"{relative(path)}: its metrics are not numbers by name")
    if not all(isinstance(name, str) and isinstance(state, dict) for name, state in content["modules"].items()):
        raise CheckpointError(f"{relative(path)}: its modules are not weights by name")
    if not all(isinstance(state, dict) for state in content["ranks"]):
        raise CheckpointError(f"{relative(path)}: its processes have no states")
    if not all(isinstance(name, str) for states in (content["plugins"], *content["ranks"]) for name in states):
        raise CheckpointError(f"{relative(path)}: a state has no plugin's name")
    return content


def _is_metrics(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    number = all(type(metric) is float or (type(metric) is int and abs(metric) < _MOST) for metric in value.values())
    return number and all(isinstance(name, str) for name in value)


def _is_plain(value: Any) -> bool:
    """Whether a value is what JSON could hold: it can be compared and printed."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (str, int, float, bool))
