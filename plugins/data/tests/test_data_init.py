"""`detkernel init`: every form and many layouts become a config that a check accepts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from detkernel import UserError
from detkernel.config import load
from detkernel_data.formats.coco import Coco
from detkernel_data.starting.command import init
from detkernel_data.starting.look import split_in
from detkernel_data.starting.parts import Survey
from detkernel_data.starting.recipe import Machine, choose
from detkernel_data.starting.splitting import groups_of, split

Image = Callable[..., Path]
NONE = np.zeros(0, dtype=np.int64)


def started(*words: str) -> Result:
    """The command, which has succeeded."""
    result = CliRunner().invoke(init, list(words), catch_exceptions=False, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80 or "wrote" in result.output
    return result


def refused(*words: str) -> str:
    result = CliRunner().invoke(init, list(words))
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def datasets(config: str) -> dict[str, Any]:
    """The data sets of a config, loaded; a check of it asks the same of them."""
    others = [f"{name}=null" for name in yaml.safe_load(Path(config).read_text()) if name not in ("data", "run")]
    loader = load(config, others).plugins["data"]
    found = {name: getattr(loader, name) for name in ("train", "val", "test") if getattr(loader, name) is not None}
    for one in found.values():
        one.load()
    return found


def ids(dataset: Any) -> set[str]:
    return {str(dataset.annotations(index).image_id) for index in range(len(dataset))}


def voc(path: Path, name: str = "cat", box: tuple[int, ...] = (5, 5, 25, 25)) -> None:
    corners = "".join(
        f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><object><name>{name}</name><bndbox>{corners}</bndbox></object></annotation>")


def coco(path: Path, names: list[str], first: int = 1, categories: tuple[str, ...] = ("cat",)) -> None:
    images = [{"id": first + n, "file_name": name, "width": 40, "height": 30} for n, name in enumerate(names)]
    objects = [
        {"id": one["id"], "image_id": one["id"], "category_id": len(categories), "bbox": [4, 4, 20, 20], "area": 400}
        for one in images
    ]
    kinds = [{"id": n, "name": name} for n, name in enumerate(categories, start=1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": kinds}))


def labelme(path: Path, image: str, label: str = "cat") -> None:
    shape = {"label": label, "points": [[4, 4], [24, 24]], "shape_type": "rectangle", "group_id": None, "flags": {}}
    content = {"version": "5.4.1", "flags": {}, "shapes": [shape], "imagePath": image, "imageData": None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "imageHeight": 30, "imageWidth": 40}))


def test_images_and_xml_in_one_folder_are_split(here: Path, make_image: Image):
    for number in range(10):
        make_image(here / f"mine/a{number}.png")
        voc(here / f"mine/a{number}.xml", "cat" if number % 2 else "dog")
    output = started("mine").output
    assert "mine: Pascal VOC" in output
    assert "2 of 10 images are drawn from seed 0, image by image" in " ".join(output.split())
    found = datasets("mine.yaml")
    assert ids(found["train"]) | ids(found["val"]) == {f"a{number}" for number in range(10)}
    assert not ids(found["train"]) & ids(found["val"])
    assert len(found["val"]) == 2
    assert found["train"].classes == ("cat", "dog")
    again = datasets("mine.yaml")
    assert ids(again["val"]) == ids(found["val"])
    assert sorted(path.name for path in (here / "mine").iterdir()) == sorted(
        f"a{number}.{kind}" for number in range(10) for kind in ("png", "xml")
    ), "nothing is written into the user's data"


def test_what_was_written_is_not_overwritten(here: Path, make_image: Image):
    for number in range(4):
        make_image(here / f"mine/a{number}.png")
        voc(here / f"mine/a{number}.xml")
    started("mine")
    text = Path("mine.yaml").read_text()
    Path("mine.yaml").write_text("# my own\n")
    assert "mine.yaml: is there already" in refused("mine")
    assert Path("mine.yaml").read_text() == "# my own\n"
    started("mine", "--force")
    assert Path("mine.yaml").read_text() == text
    (here / "other.yaml").unlink(missing_ok=True)
    (here / "other_split").mkdir()
    (here / "other_split/val.txt").write_text("mine")
    assert "other_split/val.txt" in refused("mine", "-o", "other.yaml")
    assert not Path("other.yaml").exists()


def test_lists_of_a_challenge_are_taken(here: Path, make_image: Image):
    for number in range(6):
        make_image(here / f"kit/VOC2007/JPEGImages/{number}.jpg")
        voc(here / f"kit/VOC2007/Annotations/{number}.xml")
    lists = here / "kit/VOC2007/ImageSets/Main"
    lists.mkdir(parents=True)
    for name, numbers in (("train", "012"), ("val", "34"), ("test", "5"), ("trainval", "01234"), ("cat_train", "0")):
        (lists / f"{name}.txt").write_text("\n".join(numbers))
    started("kit")
    assert {name: len(one) for name, one in datasets("kit.yaml").items()} == {"train": 3, "val": 2, "test": 1}


def test_folders_that_are_called_like_splits(here: Path, make_image: Image):
    """As Roboflow exports VOC; a class that only the validation data has is left out, and said."""
    for split_name, name in (("train", "cat"), ("valid", "cat"), ("test", "cat")):
        for number in range(2):
            stem = f"{split_name}/p{number}_jpg.rf.0{number}ab"
            make_image(here / f"robo/{stem}.jpg")
            voc(here / f"robo/{stem}.xml", name if number or split_name != "valid" else "yak")
    output = started("robo").output
    assert "val: no object of 'yak' to train on: set `ignore_classes`" in " ".join(output.split())
    found = datasets("robo.yaml")
    assert {name: len(one) for name, one in found.items()} == {"train": 2, "val": 2, "test": 2}
    assert found["val"].classes == found["train"].classes == ("cat",)


def test_coco_with_its_files_for_each_split(here: Path, make_image: Image):
    for folder in ("train2017", "val2017"):
        for number in range(2):
            make_image(here / f"c/{folder}/{folder}{number}.jpg")
        names = [f"{folder}{number}.jpg" for number in range(2)]
        coco(here / f"c/annotations/instances_{folder}.json", names)
        coco(here / f"c/annotations/person_keypoints_{folder}.json", names)
        captions = {"images": [], "annotations": [{"caption": "a cat"}], "categories": []}
        (here / f"c/annotations/captions_{folder}.json").write_text(json.dumps(captions))
    output = " ".join(started("c").output.split())
    assert "c/annotations/person_keypoints_train2017.json: about images that" in output
    assert "captions_train2017.json: no objects with boxes in it, not used" in output
    for name, dataset in datasets("c.yaml").items():
        assert dataset.annotation_file == Path(f"c/annotations/instances_{name}2017.json")
        assert dataset.image_folder == Path(f"c/{name}2017")
        assert len(dataset) == 2


def test_coco_files_of_one_split_are_joined(here: Path, make_image: Image):
    for batch in range(2):
        names = [f"b{batch}_{number}.jpg" for number in range(3)]
        for name in names:
            make_image(here / f"c/images/{name}")
        coco(here / f"c/batch{batch}.json", names, first=1 + 10 * batch, categories=("cat", "dog")[: batch + 1])
    started("c")
    found = datasets("c.yaml")
    assert len(found["train"]) + len(found["val"]) == 6
    assert found["train"].classes == ("cat", "dog")


def test_one_json_and_folders_below(here: Path, make_image: Image):
    names = [f"deep/er/{number}.jpg" for number in range(5)]
    for name in names:
        make_image(here / f"c/pics/{name}")
    coco(here / "c/labels.json", names)
    started("c/labels.json", "-o", "x.yaml")
    assert "image_folder: c/pics" in Path("x.yaml").read_text()
    assert len(datasets("x.yaml")["train"]) == 4


def test_lvis_is_read_by_its_addresses(here: Path, make_image: Image):
    make_image(here / "l/train2017/000001.jpg")
    make_image(here / "l/val2017/000002.jpg")
    for number, folder in ((1, "train2017"), (2, "val2017")):
        coco(here / f"l/lvis_v1_{folder[:-4]}.json", ["x"], first=number)
        content = json.loads((here / f"l/lvis_v1_{folder[:-4]}.json").read_text())
        del content["images"][0]["file_name"]
        content["images"][0]["coco_url"] = f"http://images.cocodataset.org/{folder}/{number:06}.jpg"
        (here / f"l/lvis_v1_{folder[:-4]}.json").write_text(json.dumps(content))
    started("l")
    found = datasets("l.yaml")
    assert [Path(one.annotations(0).path).name for one in found.values()] == ["000001.jpg", "000002.jpg"]
    alone = Coco(annotation_file=here / "l/lvis_v1_val.json", image_folder=here / "l")
    alone.load()
    assert alone.annotations(0).path == str(here / "l/val2017/000002.jpg")


def yolo(root: Path, make_image: Image, count: int = 6, images: str = "images", labels: str = "labels") -> None:
    for number in range(count):
        make_image(root / f"{images}/{number}.jpg")
        (root / labels).mkdir(parents=True, exist_ok=True)
        (root / f"{labels}/{number}.txt").write_text("2 0.5 0.5 0.5 0.5\n")


@pytest.mark.parametrize("places", [("images", "labels"), ("pics", "pics"), (".", ".")])
def test_yolo_without_a_data_yaml(here: Path, make_image: Image, places: tuple[str, str]):
    yolo(here / "y", make_image, 6, *places)
    started("y")
    found = datasets("y.yaml")
    assert len(found["train"]) == 5
    assert found["train"].classes == ("class 0", "class 1", "class 2")
    assert Path("y_split/data.yaml").is_file()


def test_yolo_names_from_classes_txt(here: Path, make_image: Image):
    yolo(here / "y", make_image)
    (here / "y/labels/classes.txt").write_text("ant\nbee\ncat\n")
    started("y")
    assert datasets("y.yaml")["train"].classes == ("ant", "bee", "cat")


def test_a_data_yaml_with_paths_of_another_machine(here: Path, make_image: Image):
    yolo(here / "y", make_image, 4, "images/train", "labels/train")
    yolo(here / "y", make_image, 2, "images/val", "labels/val")
    (here / "y/data.yaml").write_text("path: /home/me/x\ntrain: images/train\nval: images/val\nnames: [a, b, c]\n")
    output = started("y").output
    assert "its `train` is not there" in " ".join(output.split())
    found = datasets("y.yaml")
    assert {name: len(one) for name, one in found.items()} == {"train": 4, "val": 2}
    assert found["train"].classes == ("a", "b", "c")


def test_a_roboflow_export_in_yolo_form(here: Path, make_image: Image):
    for part in ("train", "valid"):
        yolo(here / "y", make_image, 2, f"{part}/images", f"{part}/labels")
    (here / "y/data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 3\nnames: ['a', 'b', 'c']\n"
    )
    output = started("y/data.yaml").output
    assert "its `test` is not there: ../test/images" in " ".join(output.split())
    assert {name: len(one) for name, one in datasets("y.yaml").items()} == {"train": 2, "val": 2}


def test_labelme(here: Path, make_image: Image):
    for number in range(5):
        make_image(here / f"m/{number}.jpg")
        labelme(here / f"m/{number}.json", f"{number}.jpg")
    assert "m: LabelMe" in started("m").output
    assert len(datasets("m.yaml")["train"]) == 4


def test_one_image_is_validated_on_too(here: Path, make_image: Image):
    make_image(here / "m/0.jpg")
    labelme(here / "m/0.json", "0.jpg")
    assert "One image cannot be split" in " ".join(started("m").output.split())
    assert {name: len(one) for name, one in datasets("m.yaml").items()} == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda here, image: image(here / "d/1.jpg"), "1 image (d/1.jpg) and no annotations"),
        (lambda here, _: (here / "d").mkdir(), "d: there is no image in this folder, or below it"),
        (lambda here, _: ((here / "d").mkdir(), (here / "d/data.zip").write_text("")), "d/data.zip: unpack that first"),
        (lambda here, _: (here / "d").write_text("?"), "d: expected a folder, a data.yaml, or a JSON file"),
        (lambda *_: None, "d: there is no such file or folder"),
    ],
    ids=["unannotated", "empty", "packed", "file", "missing"],
)
def test_nothing_to_train_on(here: Path, make_image: Image, made: Callable[..., object], message: str):
    made(here, make_image)
    assert message in refused("d")
    assert not list(here.glob("*.yaml"))


def test_an_archive_is_to_be_unpacked(here: Path, make_image: Image):
    make_image(here / "d/1.jpg")
    shutil.make_archive("d", "zip", "d")
    assert "this is an archive; unpack it first" in refused("d.zip")


def test_labels_that_belong_to_no_image(here: Path, make_image: Image):
    yolo(here / "y", make_image, 3, "pics", "txt")
    assert "the labels of images/a.jpg are labels/a.txt" in refused("y")
    coco(here / "c/a.json", ["nowhere.jpg"])
    make_image(here / "c/there.jpg")
    assert "its images, such as 'nowhere.jpg', are not below c" in refused("c")


def test_a_reader_is_given_the_option_that_it_asks_for(here: Path, make_image: Image):
    for number in range(6):
        make_image(here / f"mine/{number}.jpg")
        voc(here / f"mine/{number}.xml")
    (here / "mine/3.jpg").write_bytes((here / "mine/3.jpg").read_bytes()[:200])
    voc(here / "mine/lost.xml")
    output = " ".join(started("mine").output.split())
    assert "set `orphan_labels: drop`" in output
    assert "set `bad_images: drop`" in output
    found = datasets("mine.yaml")
    assert ids(found["train"]) | ids(found["val"]) == set("01245")


def test_a_mistake_leaves_nothing_behind(here: Path, make_image: Image):
    yolo(here / "y", make_image, 3)
    (here / "y/labels/1.txt").write_text("0 0.5 0.5 0.5 0.5 0.5 0.5 0.5\n")
    assert "y/labels/1.txt:1: " in refused("y")
    assert [path.name for path in here.iterdir()] == ["y"]


def test_groups_in_names():
    videos = [f"video{v}_frame{f:03}.jpg" for v in range(6) for f in range(10)]
    keys, how = groups_of(videos)
    assert len(set(keys)) == 6
    assert "6 groups, such as 'video0'" in how
    folders = [f"seq{v}/{f:03}" for v in range(5) for f in range(8)]
    assert len(set(groups_of(folders)[0])) == 5
    assert groups_of([f"{number:06}" for number in range(50)])[1] == "image by image"
    copies = [f"{name}_jpg.rf.{copy}f0" for name in ("ab", "cd", "ef", "gh") for copy in range(2)]
    assert len(set(groups_of(copies)[0])) == 4
    labels = [np.array([0])] * 60
    made = split(videos, labels, 0.2, 0)
    assert not {keys[number] for number in made.train} & {keys[number] for number in made.val}
    assert len(made.val) == 10
    assert split(videos, labels, 0.2, 1).val != made.val or split(videos, labels, 0.2, 2).val != made.val


def test_no_class_loses_its_last_image():
    labels = [np.array([number]) for number in range(4)] + [np.array([0]), NONE]
    for seed in range(8):
        made = split([f"x{number}" for number in range(6)], labels, 0.3, seed)
        assert {1, 2, 3} <= set(made.train)
    by_class = [f"{name}_{number}" for name in "abcdef" for number in range(5)]
    made = split(by_class, [np.array([number // 5]) for number in range(30)], 0.2, 0)
    assert made.how == "image by image"
    assert len(made.val) == 6


def test_what_names_tell_of_splits():
    assert [
        split_in(name) for name in ("instances_val2017", "valid", "Test", "training_images", "a/train", "trail")
    ] == [
        *("val", "val", "test", "train", "train", ""),
    ]


def seen(sides: list[float], sizes: list[tuple[int, int]]) -> Survey:
    boxes = np.array(sides)
    longest = max(max(size) for size in sizes)
    return Survey([str(n) for n in range(len(sizes))], np.array(sizes), boxes, boxes / longest, [NONE] * len(sizes))


def test_the_machine_and_the_data_say_how_large_images_are():
    two, gpu = Machine("", 2), Machine("H100", 16)
    blood = seen([100.0] * 20, [(480, 640)] * 200)
    assert choose(blood, two).resize == {"size": [240, 320]}
    assert choose(blood, gpu).resize == {"size": [480, 640]}
    assert choose(blood, gpu).batch_size == 16
    mixed = seen([100.0] * 20, [(480, 640), (640, 480)] * 100)
    assert choose(mixed, two).resize == {"short": 240, "long": 320}
    tiny = seen([12.0] * 20, [(480, 640)] * 200)
    assert choose(tiny, two).resize == {"size": [384, 512]}
    assert choose(blood, two).layers == [6, 12]
    assert choose(seen([420.0] * 20, [(480, 640)] * 200), two).layers == [6, 12, 15]
    many, few = choose(seen([100.0], [(480, 640)] * 100_000), two), choose(seen([100.0], [(480, 640)] * 8), two)
    assert many.epochs is None
    assert few.epochs is None
    assert choose(blood, two).epochs == 15


def test_few_boxes_of_each_class_are_trained_on_for_longer_in_smaller_images():
    two = Machine("", 2)
    one_class, all_differ = (seen([12.0] * 200, [(480, 640)] * 100) for _ in range(2))
    one_class.labels = [np.zeros(2, dtype=np.int64)] * 100
    all_differ.labels = [np.array([number % 20, number % 20]) for number in range(100)]
    plain, few = choose(one_class, two), choose(all_differ, two)
    assert (plain.few, plain.resize) == (False, {"size": [384, 512]})
    assert (few.few, few.resize) == (True, {"size": [240, 320]})
    assert few.iterations == 1500 > 4 * plain.iterations


@pytest.mark.parametrize("name", ["bccd_voc", "bmw_dolly_yolo", "coco_open", "nuclei_coco"])
def test_real_folders_are_taken(real_data: Path, here: Path, name: str):
    """`tests/test_first_day.py` trains with them."""
    started(str(real_data / name), "-o", "x.yaml")
    found = datasets("x.yaml")
    assert found["train"].classes == found["val"].classes
