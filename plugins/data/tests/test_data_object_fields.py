"""Further values of objects, from a file through transforms and batches to detections."""

import json

import pytest
import torch
from detkernel import ConfigError, DataError, UserError, hookimpl, option, plugin
from detkernel_data.formats.coco import Coco
from detkernel_data.formats.voc import Voc
from detkernel_data.formats.yolo import Yolo
from detkernel_data.loading.loader import Loader
from detkernel_data.transforms.mixing import Mosaic
from detkernel_data.transforms.standard import V2, Color, Crop, Expand, Flip, MinIouCrop, Normalize, Pad, Resize
from detkernel_data.wrappers import Concat, Repeat, Subset
from detkernel_detection import Dataset, Detections, Target, Transform
from detkernel_detection.testing import tiny_kernel
from PIL import Image

FIELDS = {"track_id": "value", "angle": "angle", "attributes": "value"}


@pytest.fixture
def coco(tmp_path):
    """Two images of two objects each: one at the left, one at the right."""
    for number in (1, 2):
        Image.new("RGB", (80, 40), (30, 30, 30)).save(tmp_path / f"{number}.png")
    boxes = [[4, 4, 20, 20], [60, 10, 16, 24]]
    annotations = [
        {"id": 2 * image + n, "image_id": image, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0}
        | {"track_id": 100 * image + n, "angle": 30 + 90 * n, "attributes": [n, 0.5]}
        for image in (1, 2)
        for n, box in enumerate(boxes)
    ]
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 80} for n in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "bolt"}],
    }

    def make(change=lambda content: None, **options):
        change(content)
        (tmp_path / "a.json").write_text(json.dumps(content))
        return Coco(annotation_file=tmp_path / "a.json", image_folder=tmp_path, **{"fields": FIELDS, **options})

    return make


def made(dataset, *transforms, **options):
    loader = Loader(train=dataset, batch_size=2, workers=0, train_transforms=list(transforms), shuffle=False, **options)
    return loader.build_loader(tiny_kernel({"data": loader}).state, "train")


def test_a_batch_has_the_fields_of_the_file(coco):
    batch = next(made(coco()).batches(0))
    assert batch.targets.fields["track_id"].shape == (2, 8)
    assert batch.targets.fields["track_id"].dtype == torch.int64
    assert batch.targets.fields["attributes"].shape == (2, 8, 2)
    assert [target.fields["track_id"].tolist() for target in batch.each_target()] == [[100, 101], [200, 201]]
    assert batch.target(1).fields["angle"].tolist() == [30, 120]
    assert batch.target(0).fields["attributes"].tolist() == [[0, 0.5], [1, 0.5]]
    batch.move("cpu")
    assert batch.keep([1]).target(0).fields["track_id"].tolist() == [200, 201]


@plugin
class LeftHalf(Transform):
    """Keeps the left half of an image, and says so in the extras."""

    moves_fields = ("value", "angle")

    def __call__(self, sample):
        from detkernel_data.transforms import geometry

        width = sample.size[1] // 2
        sample.extras["cut"] = width
        return geometry.crop(sample, (0, 0, width, sample.size[0]), sample.target.boxes[:, 0] < width)


@plugin(key="model")
class Oracle:
    """Detects what it is given, with its fields."""

    @hookimpl
    def val_step(self, run, model, batch):
        return [
            Detections(batch.image_ids[n], n, one.boxes, torch.ones(len(one)), one.labels, fields=one.fields)
            for n, one in enumerate(batch.each_target())
        ]


def test_a_track_id_and_an_angle_go_through_flip_and_crop_to_detections(coco):
    batch = next(made(coco(), Flip(probability=1), LeftHalf()).batches(0))
    found = Oracle().val_step(None, None, batch)
    assert [one.fields["track_id"].tolist() for one in found] == [[101], [201]]  # what was right is left now
    assert [one.fields["angle"].tolist() for one in found] == [[60.0], [60.0]]  # 180 - 120
    assert found[0].boxes.tolist() == [[4, 10, 20, 34]]
    assert found[0].to("cpu").keep(torch.tensor([False])).fields["angle"].tolist() == []
    assert batch.extras == [{"cut": 40}, {"cut": 40}] == batch.keep([0, 1]).extras


@pytest.mark.parametrize(
    ("transform", "angle"),
    [
        (Flip(probability=1), 150.0),
        (Flip(probability=1, direction="vertical"), -30.0),
        (Resize(short=20), 30.0),
        (Resize(size=(120, 80)), 60.0),  # three times as high: tan 60 = 3 tan 30
        (Color(), 30.0),
        (Expand(probability=1), 30.0),
        (Pad(size=(900, 900)), 30.0),
        (Crop(share=(1, 1)), 30.0),
        (MinIouCrop(overlaps=[0.9]), 30.0),
        (Normalize(), 30.0),
    ],
    ids=str,
)
def test_an_angle_turns_with_the_image(transform, angle, coco):
    loader = made(coco(), transform)
    found = [loader.samples.sample(epoch, 0).target for epoch in range(4)]
    first = [one.fields["angle"][one.fields["track_id"] == 100].tolist() for one in found]
    assert [values for values in first if values] == [pytest.approx([angle], abs=1e-4)] * len(list(filter(None, first)))
    assert any(first)


def test_a_transform_of_torchvision_keeps_values_with_their_objects(coco):
    fields = {"track_id": "value"}
    loader = made(coco(fields=fields), V2(name="RandomCrop", args={"size": [40, 44]}))
    for epoch in range(8):
        target = loader.samples.sample(epoch, 0).target
        assert len(target.fields["track_id"]) == len(target)
    heights = {
        track: (box[3] - box[1]).item()
        for epoch in range(8)
        for box, track in zip(*_boxes_and_tracks(loader, epoch), strict=True)
    }
    assert heights == {100: 20.0, 101: 24.0}


def _boxes_and_tracks(loader, epoch):
    target = loader.samples.sample(epoch, 0).target
    return target.boxes, target.fields["track_id"].tolist()


def test_a_transform_that_cannot_move_a_field_is_an_error(coco):
    message = "V2 cannot move the field 'angle' of kind 'angle' .it moves value.; leave out the transform or the field"
    with pytest.raises(ConfigError, match=message):
        made(coco(), V2(name="RandomRotation", args={"degrees": 90}))


@plugin
class Forgetful(Transform):
    """Makes a target of its own."""

    def __call__(self, sample):
        sample.target = Target(sample.target.boxes, sample.target.labels)
        return sample


def test_a_transform_that_loses_a_field_is_told(coco):
    with pytest.raises(UserError, match="in Forgetful: it gives track_id of 0 objects, and 2 labels"):
        next(made(coco(fields={"track_id": "value"}), Forgetful()).batches(0))


@plugin
class Plain(Dataset):
    """Has fields of a kind of its own."""

    dataset: Dataset = option(help="what it has besides")

    def load(self):
        self.dataset.load()
        self.classes, self.fields = self.dataset.classes, {"angle": "ellipse"}

    def __len__(self):
        return len(self.dataset)

    def image(self, index):
        return self.dataset.image(index)

    def annotations(self, index):
        return self.dataset.annotations(index)


def test_a_kind_that_nobody_knows_passes_only_what_moves_nothing(coco):
    assert next(made(Plain(dataset=coco()), Color()).batches(0)).target(0).fields["angle"].tolist() == [30, 120]
    with pytest.raises(ConfigError, match="Flip cannot move the field 'angle' of kind 'ellipse'"):
        made(Plain(dataset=coco()), Flip())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("track_id", None, "a number"), ("track_id", "7", "a number"), ("attributes", [1], "2 numbers")],
)
def test_an_object_without_the_field_is_an_error(key, value, expected, coco):
    with pytest.raises(DataError, match=f"annotation 4: `{key}`: expected {expected}, as `fields` of the data set"):
        coco(lambda content: content["annotations"][2].update({key: value})).load()


def test_wrapped_data_sets_have_the_fields_too(coco):
    for dataset in (
        Repeat(dataset=coco(), times=2),
        Subset(dataset=coco(), first=2),
        Concat(datasets=[coco(), coco()]),
    ):
        assert next(made(dataset).batches(0)).target(0).fields["track_id"].tolist() == [100, 101]
    with pytest.raises(DataError, match="concat: the `fields` are"):
        Concat(datasets=[coco(), coco(fields={})]).load()


def test_the_fingerprint_changes_with_a_field(coco):
    def fingerprint(**options):
        dataset = coco(**options)
        dataset.load()
        return dataset.fingerprint()

    before = fingerprint()
    assert before == fingerprint()
    assert before != fingerprint(change=lambda content: content["annotations"][0].update(track_id=5))


def write_voc(folder, track="<track_id>{}</track_id>", angle=None):
    """The images of `coco` in VOC form; the angle is an attribute, as CVAT writes it."""
    angle = angle or "<attributes><attribute><name>angle</name><value>{}</value></attribute></attributes>"
    box = "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>"
    for name in ("JPEGImages", "Annotations"):
        (folder / name).mkdir(exist_ok=True)
    for number in (1, 2):
        Image.new("RGB", (80, 40), (30, 30, 30)).save(folder / f"JPEGImages/{number}.png")
        objects = [
            f"<object><name>bolt</name>{box.format(*corners)}{track.format(100 * number + n)}"
            f"{angle.format(30 + 90 * n)}</object>\n"
            for n, corners in enumerate([(4, 4, 24, 24), (60, 10, 76, 34)])
        ]
        (folder / f"Annotations/{number}.xml").write_text(f"<annotation>\n{''.join(objects)}</annotation>")
    return Voc(root=folder, split=None, origin=0, fields={"track_id": "value", "angle": "angle"})


def write_yolo(folder, line="0 {} {} {} {} {} {}\n"):
    """The images of `coco` in YOLO form, with two columns more."""
    for name in ("images", "labels"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "data.yaml").write_text("names: [bolt]\ntrain: images\n")
    for number in (1, 2):
        Image.new("RGB", (80, 40), (30, 30, 30)).save(folder / f"images/{number}.png")
        boxes = [(14 / 80, 14 / 40, 20 / 80, 20 / 40), (68 / 80, 22 / 40, 16 / 80, 24 / 40)]
        text = "".join(line.format(*box, 100 * number + n, 30.0 + 90 * n) for n, box in enumerate(boxes))
        (folder / f"labels/{number}.txt").write_text(text)
    return Yolo(data=folder, split="train", fields={"track_id": "value", "angle": "angle"})


@pytest.fixture(params=["coco", "voc", "yolo"])
def dataset(request, coco, tmp_path):
    if request.param == "coco":
        return coco(fields={"track_id": "value", "angle": "angle"})
    return {"voc": write_voc, "yolo": write_yolo}[request.param](tmp_path)


def test_every_form_carries_fields_through_flip_and_crop_to_detections(dataset):
    batch = next(made(dataset, Flip(probability=1), LeftHalf()).batches(0))
    assert batch.targets.fields["track_id"].dtype == torch.int64
    found = Oracle().val_step(None, None, batch)
    assert [one.fields["track_id"].tolist() for one in found] == [[101], [201]]
    assert [one.fields["angle"].tolist() for one in found] == [[60.0], [60.0]]
    assert found[0].boxes.tolist() == [pytest.approx([4, 10, 20, 34])]


def test_every_form_carries_fields_through_a_mosaic(dataset):
    loader = made(
        dataset, Mosaic(size=(80, 160), center=(0.5, 0.5), scale=(0.5, 0.5), visible=0.9), Flip(probability=1)
    )
    target = loader.samples.sample(0, 0).target
    assert len(target) == 8
    angles = {100: 150.0, 200: 150.0, 101: 60.0, 201: 60.0}
    sizes = {0: 20.0, 1: 16.0}
    for track, angle, box in zip(*target.fields.values(), target.boxes, strict=True):
        assert angle.item() == pytest.approx(angles[track.item()])
        assert (box[2] - box[0]).item() == pytest.approx(sizes[track.item() % 100], abs=1e-4)


def test_a_field_that_a_voc_object_lacks_or_that_is_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"1.xml:2: object 1 'bolt': <track_id>: expected a number, .* got nothing"):
        write_voc(tmp_path, track="").load()
    with pytest.raises(DataError, match=r"1.xml:2: object 1 'bolt': <angle>: expected a number, .* got 'Left30'"):
        write_voc(tmp_path, angle="<angle>Left{}</angle>").load()


def test_flags_of_voc_are_fields_as_numbers(tmp_path):
    dataset = write_voc(tmp_path, track="<track_id>true</track_id><truncated>1</truncated>")
    dataset.fields = {"track_id": "value", "truncated": "value"}
    dataset.load()
    fields = dataset.annotations(0).fields
    assert {name: values.tolist() for name, values in fields.items()} == {"track_id": [1, 1], "truncated": [1, 1]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 {} {} {} {} {}\n", "1.txt:1: expected 'class x y width height', .* got 4 values before track_id, angle"),
        ("0 {} {} {} {} {} x{}\n", "1.txt:1: angle: expected a number, .* got 'x30.0'"),
        ("0\n", "1.txt:1: expected 'class x y width height', .* got 0 values before track_id, angle"),
    ],
)
def test_a_line_of_yolo_without_the_columns_is_an_error(line, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write_yolo(tmp_path, line).load()


def test_a_polygon_of_yolo_has_its_fields_behind_its_points(tmp_path):
    dataset = write_yolo(tmp_path, "0 {} {} {} {} 0.5 0.75 {} {}\n")
    dataset.load()
    notes = dataset.annotations(1)
    assert notes.fields["track_id"].tolist() == [200, 201]
    assert len(notes.masks[0][0]) == 6
