"""From a folder to drawings of detections, by the five commands of the README."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from detkernel_data.shapes import Shapes
from PIL import Image

from .conftest import long
from .pages import ROOT, block, commands

Detkernel = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ["run.until=2 iters", "run.validate=every 2 iters", "data.workers=0", "device.device=cpu", "data.batch_size=2"]


def _labelled(folder: Path, count: int) -> None:
    """Drawn shapes as images with labels of YOLO's form beside them."""
    data = Shapes(size=count, side=96, sizes=(24, 60))
    data.load()
    folder.mkdir()
    for index in range(count):
        notes = data.annotations(index)
        Image.fromarray(data.image(index).permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
        lines = [
            f"{label} {(x1 + x2) / 192} {(y1 + y2) / 192} {(x2 - x1) / 96} {(y2 - y1) / 96}\n"
            for label, (x1, y1, x2, y2) in zip(notes.labels, notes.boxes.tolist(), strict=True)
        ]
        (folder / f"{index}.txt").write_text("".join(lines))


def _five() -> list[list[str]]:
    """The words of each command; the second line has two."""
    return list(commands(block("README.md", "detkernel init")))


def test_the_readme_has_five_commands_from_a_clone_to_drawings() -> None:
    assert len(block("README.md", "detkernel init").splitlines()) == 5
    assert [" ".join(words[:2]).removeprefix(".venv/bin/") for words in _five()] == [
        "git clone", "python3 -m", "pip install", "detkernel init", "detkernel run", "detkernel predict",
    ]  # fmt: skip


def test_a_folder_becomes_drawings(tmp_path: Path, detkernel_here: Detkernel) -> None:
    """In this environment, with a training of two iterations."""
    _labelled(tmp_path / "photos", 8)
    started, trained, predicted = (words[1:] for words in _five()[-3:])
    begun = detkernel_here(*started)
    assert "next: detkernel check photos.yaml && detkernel run photos.yaml" in begun.stdout
    assert "not installed" not in begun.stdout
    checked = detkernel_here("check", *trained[1:], *SHORT)
    assert "6 images, all decoded" in checked.stdout, checked.stderr
    result = detkernel_here(*trained, *SHORT)
    assert result.returncode == 0, result.stderr
    assert "coco/bbox_mAP" in (tmp_path / "runs/photos/log.jsonl").read_text()
    assert (tmp_path / "runs/photos/report.html").is_file()
    found = detkernel_here(*predicted)
    assert found.returncode == 0, found.stderr
    assert len(list((tmp_path / "predictions/drawn").iterdir())) == 8


@long
def test_the_five_commands_as_they_stand(tmp_path: Path) -> None:
    """A clone, an environment of its own into which it is installed (torch and others are this one's), a training
    of some minutes, and objects found."""
    _labelled(tmp_path / "photos", 40)
    for program, *words in _five():
        if program == "git":
            words = [str(ROOT) if word == "REPOSITORY" else word for word in words]
        if words[:1] == ["install"]:
            words.append("--no-build-isolation")
        if words[0] == "run":
            words += ["run.until=400 iters", "run.validate=every 200 iters"]
        result = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{program} {words}\n{result.stdout}\n{result.stderr}"
        if words[0] == "-m":
            [site] = (tmp_path / ".venv").glob("lib/python*/site-packages")
            (site / "ours.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    assert sys.version_info[:2] == tuple(int(part) for part in site.parent.name.removeprefix("python").split("."))
    assert len(list((tmp_path / "predictions/drawn").iterdir())) == 40
    assert "nothing was found" not in result.stdout
