from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from detkernel_detection import Detections
from detkernel_detection.drawing import colour
from detkernel_detection.testing import TinyData, TinyDataset, tiny_kernel, tiny_run
from detkernel_report.contact_sheet import prediction_tile
from detkernel_report.curves import curves, ticks
from detkernel_report.draw_predictions import DrawPredictions
from PIL import Image


def loaded(**options):
    dataset = TinyDataset(**options)
    dataset.load()
    return dataset


def detections(dataset, index=0, **extra):
    box = torch.tensor(dataset.annotations(index).boxes, dtype=torch.float32)
    return Detections(index, index, box, torch.tensor([0.9]), torch.tensor([index % 3]), **extra)


def tile(options, dataset, found):
    return prediction_tile(options, dataset, found).image


def alert(image):
    """Whether something is written in the colour of what is to be noticed."""
    return bool((np.abs(np.asarray(image).astype(int) - (255, 196, 84)).sum(2) < 60).any())


def test_a_sheet_is_kept_of_each_validation(tmp_path):
    plugins = {
        "draw": DrawPredictions(count=3, columns=2, side=320, score=0),
        "data": TinyData(dataset=TinyDataset(size=8)),
    }
    run = tiny_run(plugins, work_dir=tmp_path, validate="every 2 iters")
    files = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert files == ["curves.png", "iter_2.jpg", "iter_4.jpg", "train_samples.jpg"]
    assert run.aside > 0, "drawn once: no part of what an iteration takes"
    with Image.open(tmp_path / "predictions" / "iter_4.jpg") as sheet:
        assert sheet.width == 2 * (320 + 12) + 12
        assert sheet.height > 2 * 340


def test_a_check_leaves_nothing(tmp_path):
    tiny_kernel({"draw": DrawPredictions()}, work_dir=tmp_path, validate="every 4 iters").check()
    assert not (tmp_path / "predictions").exists()


def test_a_sheet_on_which_nothing_is_drawn_says_so(tmp_path):
    for score, said in ((0, False), (1, True)):
        options = DrawPredictions(count=2, side=320, score=score, annotations=False)
        data = TinyData(dataset=TinyDataset(size=8))
        tiny_run({"draw": options, "data": data}, work_dir=tmp_path / str(score), validate="every 4 iters")
        with Image.open(tmp_path / str(score) / "predictions" / "iter_4.jpg") as sheet:
            assert alert(sheet) is said


def test_a_caption_says_what_was_found():
    dataset = loaded(side=64)
    found, nothing = detections(dataset), detections(dataset).keep(torch.zeros(0, dtype=torch.long))
    one, weak = (
        prediction_tile(DrawPredictions(), dataset, found),
        prediction_tile(DrawPredictions(score=1), dataset, found),
    )
    assert (one.caption, one.alert) == ("0: 1 found, 1 annotated", False)
    assert (weak.caption, weak.alert) == ("0: none found, 1 annotated; best score 0.900", True)
    none = prediction_tile(DrawPredictions(annotations=False), dataset, nothing)
    assert (none.caption, none.alert) == ("0: 0 found", True)


def test_boxes_are_drawn_where_they_are_and_annotations_over_them():
    dataset = loaded(side=64)
    options = DrawPredictions(side=640, annotations=False)
    pixels = np.asarray(tile(options, dataset, detections(dataset)))
    x1, y1, x2, y2 = (round(10 * side) for side in dataset.annotations(0).boxes[0])
    for x, y in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
        assert tuple(pixels[y, x]) == colour(0)
    both = np.asarray(tile(DrawPredictions(side=640), dataset, detections(dataset)))[y1 + 20 : y2 - 20, x2]
    assert {tuple(pixel) for pixel in both.tolist()} == {(255, 255, 255), colour(0)}


def test_low_scores_are_not_drawn_and_masks_are():
    dataset = loaded(side=64)
    plain = np.asarray(tile(DrawPredictions(side=64, score=0.95, annotations=False), dataset, detections(dataset)))
    assert (plain == dataset.image(0).permute(1, 2, 0).numpy()).all()
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, :, 50:] = 1
    drawn = np.asarray(tile(DrawPredictions(side=64, annotations=False), dataset, detections(dataset, masks=mask)))
    assert (drawn[:, 50:] != plain[:, 50:]).any(2).mean() > 0.9


def test_training_samples_are_those_that_the_model_gets(tmp_path):
    for training, expected in ((3, True), (0, False)):
        work = tmp_path / str(training)
        tiny_run({"draw": DrawPredictions(training=training, columns=3, side=320)}, work_dir=work)
        path = work / "predictions" / "train_samples.jpg"
        assert path.exists() is expected
    with Image.open(tmp_path / "3" / "predictions" / "train_samples.jpg") as sheet:
        assert sheet.width == 3 * (320 + 12) + 12
        first = np.asarray(sheet)[100:400, 12:332].astype(int)
        assert first.std() > 5


def test_curves_go_on_where_a_run_was_left(tmp_path):
    drawing = DrawPredictions(training=0)
    tiny_run({"draw": drawing}, work_dir=tmp_path, until="4 iters", validate="every 4 iters")
    held = drawing.state_dict()
    assert [iteration for iteration, _ in held["points"]] == [1, 2, 3, 4]
    assert all(value > 0 for _, value in held["points"])
    again = DrawPredictions()
    again.load_state_dict(held)
    assert again.state_dict() == held
    with Image.open(tmp_path / "predictions" / "curves.png") as image:
        assert image.size == (1240, 380)
    tiny_run({"draw": DrawPredictions(training=0, curves=False)}, work_dir=tmp_path / "b", validate="every 4 iters")
    assert not (tmp_path / "b" / "predictions" / "curves.png").exists()


def test_a_curve_is_drawn_through_its_points():
    nan = float("nan")
    data = curves([("Loss", {"a": [(0, 0.0), (100, 1.0), (50, nan)], "b": [(0, 1.0), (100, 0.0)]}), ("None", {})])
    with Image.open(BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"))
    near = (pixels[200:230, 320:346] == colour(0)).all(2).any()
    far = (pixels[80:110, 320:346] == colour(0)).all(2).any()
    assert (near, far) == (True, False)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0.31, 0.79, [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_one_value():
    for value in (0, 3, -2.5, 1e-9):
        found = ticks(value, value)
        assert found[0] <= value <= found[-1]
        assert found[0] < found[-1]


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "predictions" / "iter_4.jpg").mkdir(parents=True)
    (tmp_path / "predictions" / "iter_4.jpg" / "x").touch()
    run = tiny_run({"draw": DrawPredictions(score=0)}, work_dir=tmp_path, validate="every 4 iters")
    assert run.iter == 4
    assert "iter_4.jpg could not be written" in caplog.text
    assert Path(tmp_path / "predictions" / "iter_4.jpg" / "x").exists()


def test_a_link_is_replaced_and_its_aim_left_alone(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "predictions").mkdir()
    sheet = tmp_path / "predictions" / "iter_4.jpg"
    sheet.symlink_to(tmp_path / "victim")
    tiny_run({"draw": DrawPredictions()}, work_dir=tmp_path, validate="every 4 iters")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not sheet.is_symlink()
    assert sheet.read_bytes().startswith(b"\xff\xd8")


def test_the_sheet_has_images_from_all_over_the_data_in_rows(tmp_path):
    """Each image of this data set has one colour: the sheet says which were drawn, and where."""

    class Plain(TinyDataset):
        """Image number n is grey of level 10 n."""

        def image(self, index):
            return torch.full((3, 64, 64), 10 * index, dtype=torch.uint8)

    options = {"count": 5, "columns": 3, "side": 320, "score": 1, "annotations": False}
    plugins = {"draw": DrawPredictions(**options), "data": TinyData(dataset=Plain(size=12))}
    tiny_run(plugins, work_dir=tmp_path, validate="every 4 iters")
    with Image.open(tmp_path / "predictions" / "iter_4.jpg") as sheet:
        top = sheet.height - 2 * (320 + 24 + 12)
        centres = [(12 + 332 * (at % 3) + 160, top + 356 * (at // 3) + 160) for at in range(6)]
        levels = [sheet.convert("L").getpixel(centre) for centre in centres]
    assert levels == pytest.approx([0, 20, 40, 70, 90, 26], abs=2)


@pytest.mark.parametrize(("count", "columns", "size"), [(20, 4, (4, 2)), (2, 4, (2, 1)), (8, 1, (1, 8))])
def test_no_more_images_and_columns_than_there_are(tmp_path, count, columns, size):
    options = {"count": count, "columns": columns, "side": 320}
    plugins = {"draw": DrawPredictions(**options), "data": TinyData(dataset=TinyDataset(size=8))}
    tiny_run(plugins, work_dir=tmp_path, validate="every 4 iters")
    with Image.open(tmp_path / "predictions" / "iter_4.jpg") as sheet:
        assert sheet.width == size[0] * 332 + 12
        assert 80 < sheet.height - size[1] * 356 < 200


def test_a_score_of_just_the_threshold_is_drawn():
    dataset = loaded(side=64)
    found = detections(dataset)
    found.scores[0] = 0.5
    drawn = {
        score: (np.asarray(tile(DrawPredictions(score=score, annotations=False), dataset, found)) == colour(0))
        .all(2)
        .any()
        for score in (0.5, 0.51)
    }
    assert drawn == {0.5: True, 0.51: False}


@pytest.mark.parametrize(("size", "expected"), [((40, 80), (128, 64)), ((80, 40), (64, 128)), ((200, 100), (64, 128))])
def test_the_longer_side_is_scaled_and_boxes_with_it(size, expected):
    """`size` is (height, width), what Pillow gives (width, height)."""

    class Black(TinyDataset):
        """Of another form than a square."""

        def image(self, index):
            return torch.zeros(3, *size, dtype=torch.uint8)

    dataset = Black()
    dataset.load()
    box = torch.tensor([[size[1] / 4, size[0] / 2, size[1] / 2, size[0] * 0.75]])
    found = Detections(0, 0, box, torch.tensor([0.9]), torch.tensor([1]))
    drawn = tile(DrawPredictions(side=128, annotations=False), dataset, found)
    assert drawn.size == expected
    pixels = np.asarray(drawn)
    x1, y1, x2, y2 = (round(share * side) for share, side in zip((0.25, 0.5, 0.5, 0.75), 2 * drawn.size, strict=True))
    for x, y in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
        assert tuple(pixels[y, x]) == colour(1)
    assert tuple(pixels[(y1 + y2) // 2, (x1 + x2) // 2]) == (0, 0, 0)


def test_boxes_of_a_model_gone_astray_are_drawn_as_far_as_they_can_be():
    dataset = loaded(side=64)
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan, 0, 9, 9], [0, 0, inf, 9], [-1e30, 10, 1e30, 1e30], [50, 50, 10, 10]])
    found = Detections(0, 0, boxes, torch.tensor([0.9, 0.8, 0.7, nan]), torch.tensor([0, 0, 1, 2]))
    pixels = np.asarray(tile(DrawPredictions(side=64, annotations=False), dataset, found))
    assert (pixels[10] == colour(1)).all(), "the one edge that crosses the image"
    assert not (pixels == colour(0)).all(2).any()
    assert not (pixels == colour(2)).all(2).any()
