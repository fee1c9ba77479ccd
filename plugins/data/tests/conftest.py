"""Shared by the tests of data sets: images on disk, the real data, and how a data set refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detkernel import DataError
from detkernel_detection import Dataset
from PIL import Image

ROOT = Path(__file__).parents[3]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the current one: messages name files as seen from it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def make_image() -> Callable[..., Path]:
    """Write an image of a smooth gradient: `image(path, 40, 30, mode="L", quality=95)`."""

    def write(path: Path, width: int = 40, height: int = 30, mode: str = "RGB", **save: Any) -> Path:
        rows, columns = np.mgrid[0:height, 0:width]
        pixels = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], axis=2)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, **save)
        return path

    return write


@pytest.fixture
def refusal() -> Callable[[Dataset], str]:
    """The message with which a data set refuses to load."""

    def load(dataset: Dataset) -> str:
        with pytest.raises(DataError) as refused:
            dataset.load()
        assert refused.value.__cause__ is None
        assert refused.value.__suppress_context__ or refused.value.__context__ is None, "a traceback of two errors"
        return str(refused.value)

    return load


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("DETKERNEL_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip("no real data here: set DETKERNEL_DATA")
    return folder
