from pathlib import Path

import numpy as np
import pytest
import torch
from detkernel_detection import Detections
from detkernel_detection.testing import TinyData, TinyDataset, tiny_kernel, tiny_run
from detkernel_report.contact_sheet import colour, tile
from detkernel_report.draw_predictions import DrawPredictions
from PIL import Image


def loaded(**options):
    dataset = TinyDataset(**options)
    dataset.load()
    return dataset


def detections(dataset, index=0, **extra):
    box = torch.tensor(dataset.annotations(index).boxes, dtype=torch.float32)
    return Detections(index, index, box, torch.tensor([0.9]), torch.tensor([index % 3]), **extra)


def test_a_sheet_is_written_after_a_validation(tmp_path):
    plugins = {
        "draw": DrawPredictions(count=3, columns=2, side=64, score=0),
        "data": TinyData(dataset=TinyDataset(size=8)),
    }
    tiny_run(plugins, work_dir=tmp_path, validate="every 4 iters")
    with Image.open(tmp_path / "predictions.png") as sheet:
        assert sheet.size == (2 * 70 + 6, 2 * 70 + 6)  # three images of 64 in rows of two


def test_a_check_leaves_nothing(tmp_path):
    tiny_kernel({"draw": DrawPredictions()}, work_dir=tmp_path, validate="every 4 iters").check()
    assert not (tmp_path / "predictions.png").exists()


def test_boxes_are_drawn_where_they_are():
    dataset = loaded(side=64)
    options = DrawPredictions(side=128, annotations=False)
    pixels = np.asarray(tile(options, dataset, detections(dataset)))
    x1, y1, x2, y2 = (round(2 * side) for side in dataset.annotations(0).boxes[0])
    for x, y in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
        assert tuple(pixels[y, x]) == colour(0)


def test_annotations_are_drawn_in_white():
    dataset = loaded(side=64)
    nothing = Detections(0, 0, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    for shown in (True, False):
        pixels = np.asarray(tile(DrawPredictions(side=64, annotations=shown), dataset, nothing))
        assert bool((pixels == 255).all(2).any()) is shown


def test_annotations_are_scaled_as_the_image_is_and_the_best_detection_lies_on_top():
    dataset = loaded(side=64)
    box = torch.tensor(dataset.annotations(0).boxes, dtype=torch.float32)
    nothing = Detections(0, 0, torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long))
    x1, y1, x2, y2 = (round(2 * side) for side in box[0].tolist())
    pixels = np.asarray(tile(DrawPredictions(side=128), dataset, nothing))
    for x, y in ((x1, (y1 + y2) // 2), (x2, (y1 + y2) // 2), ((x1 + x2) // 2, y2)):
        assert tuple(pixels[y, x]) == (255, 255, 255)
    both = Detections(0, 0, box.repeat(2, 1), torch.tensor([0.9, 0.8]), torch.tensor([1, 2]))
    assert tuple(np.asarray(tile(DrawPredictions(side=128), dataset, both))[(y1 + y2) // 2, x1]) == colour(1)


def test_low_scores_are_not_drawn_and_masks_are():
    dataset = loaded(side=64)
    plain = np.asarray(tile(DrawPredictions(side=64, score=0.95, annotations=False), dataset, detections(dataset)))
    assert (plain == dataset.image(0).permute(1, 2, 0).numpy()).all()
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, :, 50:] = 1
    drawn = np.asarray(tile(DrawPredictions(side=64, annotations=False), dataset, detections(dataset, masks=mask)))
    assert (drawn[:, 50:] != plain[:, 50:]).any(2).mean() > 0.9


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    (tmp_path / "predictions.png").mkdir()
    (tmp_path / "predictions.png" / "x").touch()
    run = tiny_run({"draw": DrawPredictions(score=0)}, work_dir=tmp_path, validate="every 4 iters")
    assert run.iter == 4
    assert "predictions.png could not be written" in caplog.text
    assert Path(tmp_path / "predictions.png" / "x").exists()


def test_neighbouring_classes_have_colours_far_apart():
    colours = np.array([colour(label) for label in range(20)])
    assert len(np.unique(colours, axis=0)) == 20
    assert (np.abs(np.diff(colours.astype(int), axis=0)).sum(1) > 100).all()


def test_a_link_is_replaced_and_its_aim_left_alone(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "predictions.png").symlink_to(tmp_path / "victim")
    tiny_run({"draw": DrawPredictions()}, work_dir=tmp_path, validate="every 4 iters")
    assert (tmp_path / "victim").read_text() == "mine"
    assert not (tmp_path / "predictions.png").is_symlink()
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "name", ["evil\nclass", "\x1b]0;PWN\x07", "\ud800x", "../../x/y", " ", "", "\u6f22\u5b57", "\u202ecba", "x" * 5000]
)
def test_any_name_of_a_class_can_be_drawn(name):
    dataset = loaded(side=64)
    dataset.classes = (name, name, name)
    pixels = np.asarray(tile(DrawPredictions(side=128, annotations=False), dataset, detections(dataset)))
    assert pixels.shape == (128, 128, 3)
    assert (pixels == colour(0)).all(2).any()


def test_the_sheet_has_images_from_all_over_the_data_in_rows(tmp_path):
    """Each image of this data set has one colour: the sheet says which were drawn, and where."""

    class Plain(TinyDataset):
        """Image number n is grey of level 10 n."""

        def image(self, index):
            return torch.full((3, 64, 64), 10 * index, dtype=torch.uint8)

    options = {"count": 5, "columns": 3, "side": 64, "score": 1, "annotations": False}
    plugins = {"draw": DrawPredictions(**options), "data": TinyData(dataset=Plain(size=12))}
    tiny_run(plugins, work_dir=tmp_path, validate="every 4 iters")
    with Image.open(tmp_path / "predictions.png") as sheet:
        centres = [(6 + 70 * (at % 3) + 32, 6 + 70 * (at // 3) + 32) for at in range(6)]
        levels = [sheet.getpixel(centre) for centre in centres]
        assert sheet.size == (3 * 70 + 6, 2 * 70 + 6)
    assert levels == [*((10 * index,) * 3 for index in (0, 2, 4, 7, 9)), (24, 26, 30)]


@pytest.mark.parametrize(("count", "columns", "size"), [(20, 4, (4, 2)), (2, 4, (2, 1)), (8, 1, (1, 8))])
def test_no_more_images_and_columns_than_there_are(tmp_path, count, columns, size):
    options = {"count": count, "columns": columns, "side": 64}
    plugins = {"draw": DrawPredictions(**options), "data": TinyData(dataset=TinyDataset(size=8))}
    tiny_run(plugins, work_dir=tmp_path, validate="every 4 iters")
    with Image.open(tmp_path / "predictions.png") as sheet:
        assert sheet.size == (size[0] * 70 + 6, size[1] * 70 + 6)


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
