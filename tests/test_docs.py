"""Every block of code and every command in the documentation runs, and every config in it is valid."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from detkernel import declared

from .conftest import Warm
from .pages import PAGES, ROOT, block, blocks, commands

Detkernel = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path: Path, python: Warm, request: pytest.FixtureRequest) -> None:
    if "best.onnx" in code:
        pytest.skip("run by tests/test_export_command.py, which has such a file")
    if "best.pt" in code:
        shutil.copytree(request.getfixturevalue("used"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "block.py").write_text(code)
    result = python("block.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


BASE = """
run: {until: 1 epoch, validate: every 1 epoch, work_dir: work}
data:
  use: loader
  train: {use: shapes, size: 2, side: 64, sizes: [12, 40]}
  val: {use: shapes, size: 2, side: 64, sizes: [12, 40], split: val}
  batch_size: 2
  workers: 0
model: {use: MODEL, backbone: {use: mobilenet_v3, size: small, layers: [3, 8]}, neck_channels: 64}
optimizer: {use: sgd, lr: 1e-3}
device: {device: cpu}
coco_map: {}
"""
"""For blocks that show a part of a config."""
BRIEF = ["run.until=2 epochs", "run.validate=every 2 epochs", "schedule.milestones=[1 epochs]"]
SMALL_RESNET = "model.backbone={use: mobilenet_v3, size: small, layers: [3, 8]}"
SHORTER = {  # what a block on its own has of networks and patience, and the tests have not
    "docs/start.md": [
        *(*BRIEF, "schedule.warmup=1 iters", SMALL_RESNET),
        "model.neck={use: fpn, channels: 64, finest: 8, extra: 0}",
    ],
    "README.md": [
        *(*BRIEF, "checkpoint.every=2 epochs", SMALL_RESNET),
        "model.neck={use: fpn, channels: 64, finest: 4, extra: 1, extra_from: pool}",
        "model.box_head={use: fc_box_head, channels: 64}",
    ],
    "docs/config.md": [
        *("data.train.size=4", "data.train.side=64", "data.train.sizes=[12, 40]", "data.val.size=2"),
        "run.until=1 epochs",
    ],
    "plugins/optim/README.md": ["run.until=12 epochs", "run.validate=null", "schedule.warmup=5 iters"],
}


def _smaller(text: str) -> str:
    """With images an eighth as large: 544 pixels are enough for a network, 68 for its test."""
    sides = r"\b(short|long|size|between|step): (\d+|\[[\d, ]+\])"
    return re.sub(sides, lambda found: re.sub(r"\d+", lambda side: str(-(-int(side[0]) // 8)), found[0]), text)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets that the pages name, of two images each, in the forms of VOC, COCO and YOLO."""
    folder = tmp_path_factory.mktemp("shown")
    for place, name in (("BCCD", "RBC"), ("cells", "RBC"), ("VOCdevkit/VOC2007", "cat"), ("VOCdevkit/VOC2012", "dog")):
        _write_data(folder / "data" / place, name)
    return folder


def _write_data(root: Path, name: str) -> None:
    import numpy as np
    from PIL import Image

    for part in (
        "JPEGImages",
        "Annotations",
        "ImageSets/Main",
        "images/train",
        "images/val",
        "labels/train",
        "labels/val",
    ):
        (root / part).mkdir(parents=True)
    coco: dict[str, list[object]] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": name}]}
    for number, split in enumerate(("train", "train", "val", "val")):
        image = Image.fromarray(np.random.default_rng(number).integers(0, 255, (48, 64, 3), dtype=np.uint8))
        for file in (f"JPEGImages/{number}.jpg", f"images/{number}.jpg", f"images/{split}/{number}.jpg"):
            image.save(root / file)
        box = "<xmin>11</xmin><ymin>11</ymin><xmax>40</xmax><ymax>40</ymax>"
        (root / f"Annotations/{number}.xml").write_text(
            f"<annotation><filename>{number}.jpg</filename><size><width>64</width><height>48</height></size>"
            f"<object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>"
        )
        (root / f"labels/{split}/{number}.txt").write_text("0 0.390625 0.520833 0.46875 0.625\n")
        coco["images"].append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
        coco["annotations"].append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 30, 30], "area": 900, "iscrowd": 0}
        )
    for split, numbers in (
        ("train", "0\n1\n"),
        ("val", "2\n3\n"),
        ("trainval", "0\n1\n"),
        ("test", "2\n3\n"),
        ("night", "2\n3\n"),
    ):
        (root / f"ImageSets/Main/{split}.txt").write_text(numbers)
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(coco))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: [{name}]\n")


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configs_train(
    text: str,
    shown: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    detkernel_here: Detkernel,
) -> None:
    """Every config is read as it stands, then checked and trained with, smaller and for a shorter time; what shows a
    part of one is put into a small one."""
    (tmp_path / "data").symlink_to(shown / "data")
    (tmp_path / "my_plugin.py").write_text(_my_plugin())
    (tmp_path / "detkernel_configs").symlink_to(ROOT / "configs")  # as an installed detkernel has it
    monkeypatch.syspath_prepend(tmp_path)
    model = "torchvision_mask_rcnn" if "segm" in text else "torchvision_fcos"
    (tmp_path / "base.yaml").write_text(BASE.replace("MODEL", model))
    whole = "\nrun:" in f"\n{text}"
    (tmp_path / "config.yaml").write_text(text if whole or "base:" in text else f"base: base.yaml\n{text}")
    result = detkernel_here("config", "config.yaml", *([] if whole else ["run.until=1 iters"]))
    assert result.returncode == 0, result.stdout + result.stderr
    if 'weights: "torchvision:' in text:  # a download
        return
    (tmp_path / "config.yaml").write_text(_smaller((tmp_path / "config.yaml").read_text()))
    overrides = ["data.workers=0", *SHORTER.get(request.node.callspec.id.rpartition(":")[0], [])]
    if re.search(r"^  train:", text, re.MULTILINE) and not re.search(r"^  val:", text, re.MULTILINE):
        overrides += ["data.val=null", "run.validate=null", "coco_map=null"]  # both have the same classes
    for command in ("check", "run"):
        result = detkernel_here(command, "config.yaml", *overrides)
        assert result.returncode == 0, result.stdout + result.stderr


SMALL = [
    *("run.until=2 iters", "run.validate=null", "data.workers=0", "data.train.size=16", "data.val.size=4"),
    *(f"data.{split}.{value}" for split in ("train", "val") for value in ("side=64", "sizes=[12, 40]")),
]
MADE_ELSEWHERE = [  # by .ci/run, the tox environment `install` and tests/test_first_day.py, in fresh environments
    "git clone REPOSITORY detkernel",
    "cd detkernel",
    "python3 -m venv .venv",
    ".venv/bin/pip install .",
    ".venv/bin/pip install ./detkernel",
    ".venv/bin/pip install -q tox",
    ".venv/bin/tox -p 3",
]
SEVERAL = ("--nnodes", "--nproc-per-node", "srun")
"""What starts several processes: tests/test_launch.py does that, and here is seen that the options are there."""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages suppose it: a run in runs/cells with its best checkpoint, photos, a film."""
    import numpy as np
    from click.testing import CliRunner
    from detkernel.cli import cli
    from PIL import Image

    folder = tmp_path_factory.mktemp("used")
    base = BASE.replace("work_dir: work", "work_dir: runs/cells")
    config = base.replace("MODEL", "fcos").replace("neck_channels: 64", "neck: {use: fpn, channels: 8, extra: 0}")
    config = config.replace("  batch_size", "  val_transforms: [{use: resize, size: [64, 64]}]\n  batch_size")
    (folder / "config.yaml").write_text(config + "checkpoint: {best: coco/bbox_mAP}\n")
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(cli, ["run", "config.yaml"])
    finally:
        os.chdir(before)
    assert done.exit_code == 0, (done.output, done.exception)
    for name in ("image.jpg", "photos/a.jpg", "photos/b.jpg", "more/c.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def _film(path: Path) -> None:
    import numpy as np

    cv2 = pytest.importorskip("cv2")
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (80, 60))
    writer.write(np.zeros((60, 80, 3), dtype=np.uint8))
    writer.release()


@pytest.fixture(scope="module")
def ran(used: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The folder in which all pages' commands run, and those that ran: what two pages show runs once."""
    folder = tmp_path_factory.mktemp("ran")
    shutil.copytree(used, folder, dirs_exist_ok=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    for name in ("config.yaml", "cells.yaml"):
        (folder / name).write_text("base: configs/shapes.yaml")
    (folder / "found.json").write_text("[]")
    return folder, set()


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_run(text: str, ran: tuple[Path, set[str]], python: Warm, detkernel_here: Detkernel) -> None:
    if "detkernel init" in text:
        pytest.skip("from a folder to its drawings: run by tests/test_first_day.py")
    folder, already = ran
    if "film" in text:
        _film(folder / "film.mp4")
    for program, *words in commands(text):
        command = " ".join([program, *words])
        name, place = program.removeprefix(".venv/bin/"), f"{folder}: {command.removeprefix('.venv/bin/')}"
        if command in MADE_ELSEWHERE or {program, *words} & {*SEVERAL} or place in already:
            continue
        already.add(place)
        if name == "cd":
            folder /= words[0]
        elif name == "python":
            _has_options(ROOT / words[0], words[1:])
        elif name == "detkernel":
            if not _is_export(words):
                result = detkernel_here(*_short(words), cwd=folder)
                assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        else:
            arguments = {
                "pip": ["install", "-q", "--no-deps", "--no-build-isolation", "--target", "site", "."],
                "pytest": ["-q", *words],
            }[name]
            result = python("-m", name, *arguments, cwd=folder, env={"PYTHONPATH": str(folder / "site")})
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def _short(words: list[str]) -> list[str]:
    """The same on little data."""
    if words[0] in ("check", "run", "test", "profile") and not words[1].endswith(".onnx"):
        words = [*words, *SMALL]
    return [*words, "run.until=3 iters", "--iterations", "1", "--warmup", "1"] if words[0] == "profile" else words


def _is_export(words: list[str]) -> bool:
    """Minutes for all of them: in `tox -e torture`; tests/test_export_command.py runs some."""
    return "DETKERNEL_LONG" not in os.environ and (words[0] == "export" or any(".onnx" in word for word in words))


def _has_options(script: Path, words: list[str]) -> None:
    """A benchmark takes minutes: here, that its options are there."""
    source = script.read_text(encoding="utf-8")
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


def test_continuous_integration_runs_what_the_readme_says() -> None:
    command = (ROOT / ".ci/run").read_text().splitlines()[-1]
    assert f"```sh\n{command}\n```" in (ROOT / "README.md").read_text()


def test_every_block_says_its_language() -> None:
    for page in PAGES:
        opened = re.findall(r"^```(\w*)$", page.read_text(encoding="utf-8"), re.MULTILINE)[::2]
        assert "" not in opened, f"{page.relative_to(ROOT)}: a block without a language: text, or should it run?"


def test_every_installed_plugin_is_documented() -> None:
    """A class without a docstring and an option without a meaning are refused; here, that the reference has them."""
    from detkernel.catalog import Catalog
    from detkernel.reference import option_rows, plugin_page

    catalog = Catalog()
    assert len(catalog.entries) > 40
    for name in catalog.entries:
        cls = catalog.load(name)
        page = plugin_page(name, cls, catalog.find(name))
        for option, _, default, meaning in option_rows(cls):
            assert len(meaning.split(" (")[0]) > 5, f"{name}.{option} has no meaning"
            assert option in page
            assert default
        published = [spec for spec in vars(declared(cls).events or object).values() if hasattr(spec, "detkernel_spec")]
        for spec in published:
            assert (spec.__doc__ or "").strip(), f"{name} publishes {spec.__name__} without a word about it"
            assert f"publishes {spec.__name__}(" in page


def test_the_site_has_every_public_class_of_the_detection_library() -> None:
    """The page is read from the source; here, that no public class or function is without a docstring."""
    import importlib.util
    import inspect
    import pkgutil

    import detkernel_detection

    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec
    assert spec.loader
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    page = "\n".join(generate.library_page("detkernel_detection"))
    for found in pkgutil.walk_packages(detkernel_detection.__path__, "detkernel_detection."):
        for name, value in vars(importlib.import_module(found.name)).items():
            of_it = getattr(value, "__module__", None) == found.name and not name.startswith("_")
            if of_it and (inspect.isclass(value) or inspect.isfunction(value)):
                kind = "class" if inspect.isclass(value) else "def"
                assert f"\n### {kind} {name}\n" in page, f"{found.name}.{name} has no docstring"
    assert "float32 [B, M, 4] xyxy in pixels of the batch's images." in page


def _my_plugin() -> str:
    """The plugin that the README shows."""
    return block("README.md", "class MyPlugin")


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            made = re.match(
                r"(\.\./)*(reference/|extend/|packages/|families/|zoo|catalogue)", target
            )  # by docs/generate.py
            assert made or (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_the_catalogue_says_of_the_examples_what_their_tests_run() -> None:
    import yaml

    listed = {entry["name"]: entry for entry in yaml.safe_load((ROOT / "docs/catalogue.yaml").read_text())}
    for folder in (path.parent for path in ROOT.glob("docs/examples/*/pyproject.toml")):
        tests = (folder / f"test_{folder.name}.py").read_text(encoding="utf-8")
        run = set(re.findall(r"\b(?!Test)[A-Z]\w+Contract\b", tests))
        assert run == set(re.findall(r"[A-Z]\w+Contract", listed[folder.name]["status"])), folder.name
