"""The house stands as `docs/architecture.md` says: who may import whom. `python docs/house.py` prints the rooms."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("house", Path(__file__).parent.parent / "docs" / "house.py")
assert _spec is not None
assert _spec.loader is not None
house = sys.modules["house"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(house)

PACKAGES = house.packages()
PLUGINS = [name for name in PACKAGES if name != "detkernel"]


def test_the_kernel_names_no_torch_and_no_plugin():
    found = [
        f"{name}:{made.line}: {made.name}"
        for name, path in house.modules(PACKAGES["detkernel"]).items()
        for made in house.imports(path)
        if made.name.partition(".")[0] in (*house.HEAVY, *PLUGINS)
    ]
    assert found == []


@pytest.mark.parametrize("package", PLUGINS)
def test_a_plugin_imports_the_kernel_the_detection_library_and_itself(package: str):
    allowed = {"detkernel", "detkernel_detection", package}
    found = [
        f"{name}:{made.line}: {made.name}"
        for name, path in house.modules(PACKAGES[package]).items()
        for made in house.imports(path)
        if made.name.startswith("detkernel") and made.name.partition(".")[0] not in allowed
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str):
    assert house.cycles(PACKAGES[package]) == []


_POSIX_ALONE = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios"}
_SIGNALS_OF_ALL = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_IGN", "SIG_DFL"}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_can_be_imported_where_the_system_is_not_linux(package: str):
    """What only POSIX has is imported where it is used; a signal that others lack is asked for by its name."""
    found = []
    for name, path in house.modules(PACKAGES[package]).items():
        early = [made for made in house.imports(path) if made.at_import and made.name in _POSIX_ALONE]
        found += [f"{name}:{made.line}: {made.name}" for made in early]
        named = set(re.findall(r"\bsignal\.(SIG[A-Z0-9_]+)|\b(os\.fork)\b", path.read_text()))
        found += [f"{name}: {number or fork}" for number, fork in named if number not in _SIGNALS_OF_ALL]
    assert found == []


def test_imports_are_found_wherever_they_are(tmp_path: Path):
    folder = tmp_path / "p"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("import p.b\ndef f():\n    from torch import nn\n    import_module('numpy.random')\n")
    (folder / "b.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p import a\nfrom p.c import x\n"
    )
    (folder / "c.py").write_text('"""torch is a word here."""\nx = 1\ndef f():\n    from p import a\n')
    assert [(made.name, made.line, made.at_import) for made in house.imports(folder / "a.py")] == [
        ("p.b", 1, True),
        ("torch.nn", 3, False),
        ("numpy.random", 4, False),
    ]
    assert house.cycles(folder) == []
    (folder / "c.py").write_text("try:\n    from p import a\nexcept ImportError: ...\n")
    assert house.cycles(folder) == [["p.a", "p.b", "p.c", "p.a"]]


def test_lines_of_code_are_neither_docstrings_nor_comments_nor_blank():
    source = '"""Text.\n\nMore."""\n\n# a comment\nx = """not a\ndocstring"""\ndef f():\n    "one line"\n    return x\n'
    assert house.lines_of_code(source) == 4


def test_the_rooms_are_printed(capsys: pytest.CaptureFixture[str]):
    house.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{printed}" for name in PACKAGES)
    assert "\n    detkernel_detection.structures\n" in printed


def test_the_kernel_has_no_word_of_what_it_runs():
    """Not even in a docstring: what is said there should be true of any kind of training."""
    words = re.compile(r"torch|numpy|tensor|image|pixel|\bbox(es)?\b|\bmasks?\b|keypoint|\bcoco\b", re.IGNORECASE)
    found = [
        f"{name}: {line.strip()}"
        for name, path in house.modules(PACKAGES["detkernel"]).items()
        for line in path.read_text(encoding="utf-8").splitlines()
        if words.search(line)
    ]
    assert found == []


def test_an_image_is_followed_through_the_six_files_that_the_architecture_page_lists(tmp_path: Path):
    from detkernel_data.cleaning.clean import clean
    from detkernel_data.formats.coco import Coco
    from detkernel_data.loading.samples import Samples
    from detkernel_data.transforms.standard import Flip
    from detkernel_detection.batching import pack_samples
    from detkernel_detection.images import decode
    from PIL import Image

    Image.new("RGB", (80, 40)).save(tmp_path / "1.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 4, 20, 20]}
    image = {"id": 1, "file_name": "1.png", "height": 40, "width": 80}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "bolt"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    followed: dict[str, None] = {}
    reached = []

    def follow(frame: Any, event: str, _: object) -> None:
        """Which files lie between the test and a place that an image comes by."""
        if event != "call" or frame.f_code not in [function.__code__ for function in (clean, decode, pack_samples)]:
            return
        reached.append(frame.f_code.co_name)
        files = []
        while frame.f_code.co_filename != __file__:
            files.append(frame.f_code.co_filename)
            frame = frame.f_back
        followed.update(dict.fromkeys(files[::-1]))

    dataset = Coco(annotation_file=tmp_path / "a.json", image_folder=tmp_path)
    sys.setprofile(follow)
    try:
        dataset.load()
        packed = Samples(dataset, [Flip()], seed=0)[0, [(0, 0)]]
    finally:
        sys.setprofile(None)
    assert packed.images.shape == (1, 3, 40, 80)
    assert reached == ["clean", "decode", "pack_samples"]
    page = (house.ROOT / "docs/architecture.md").read_text()
    listed = re.findall(r"^\| `(detkernel_\w+/.*?\.py)` \|", page, re.MULTILINE)
    assert len(listed) == 6
    assert sorted(listed) == sorted(path[path.index("/detkernel_") + 1 :] for path in followed)
