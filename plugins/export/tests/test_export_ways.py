"""Tiles, mirror images and sizes, with a detector that finds bright rectangles."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from detkernel import UserError
from detkernel_detection import Detections
from detkernel_export.ways import Ways, _starts


class Bright:
    """Finds the one rectangle of each level of 100 and more: its class is the level less 100."""

    def __init__(self, keypoint_names=(), masks=False):
        self.transforms, self.keypoint_names, self.masks = [], keypoint_names, masks
        self.seen = []

    def detect(self, samples, batch_size):
        assert len({sample.size for sample in samples}) == 1 or batch_size == 1
        return [self.one(sample) for sample in samples]

    def one(self, sample):
        image, (y, x) = sample.image, sample.scale
        self.seen.append(sample.size)
        boxes, labels, masks, points = [], [], [], []
        for level in sorted(set(image[0].flatten().tolist())):
            rows, columns = (image[0] == level).any(1).nonzero(), (image[0] == level).any(0).nonzero()
            if level < 100 or len(rows) * len(columns) < 4:
                continue
            box = [int(columns[0]) / x, int(rows[0]) / y, (int(columns[-1]) + 1) / x, (int(rows[-1]) + 1) / y]
            boxes.append(box)
            labels.append(level - 100)
            masks.append((image[0] == level).to(torch.uint8))
            points.append([[box[0], box[1], 1.0], [box[2], box[1], 1.0]])
        count = len(boxes)
        return Detections(
            0, 0, torch.tensor(boxes).reshape(-1, 4), torch.linspace(0.9, 0.8, count), torch.tensor(labels).long(),
            torch.stack(masks) if self.masks and count else None,
            torch.tensor(points).reshape(count, 2, 3) if self.keypoint_names else None,
        )  # fmt: skip


def image(height, width, *boxes):
    """Black, with rectangles of (x1, y1, x2, y2, level)."""
    made = torch.zeros(3, height, width, dtype=torch.uint8)
    for x1, y1, x2, y2, level in boxes:
        made[:, y1:y2, x1:x2] = level
    return made


def found(ways, given, model=None, batch_size=1):
    one = ways.detect(model or Bright(), [given], batch_size)[0]
    pairs = zip(one.labels.tolist(), one.boxes.tolist(), strict=True)
    return sorted((label, [round(side) for side in box]) for label, box in pairs)


class TestTiles:
    def test_they_cover_the_image_and_overlap(self):
        for side, tile, overlap in ((1000, 256, 0.2), (257, 256, 0), (10_000, 640, 0.25), (100, 256, 0.2)):
            starts = _starts(side, tile, overlap)
            assert starts[0] == 0
            assert starts[-1] == max(side - tile, 0)
            steps = [after - before for before, after in pairwise(starts)]
            assert all(0 < step <= tile * (1 - overlap) + 1 for step in steps)

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_objects_are_found_once_wherever_they_lie(self, batch_size):
        objects = [(5, 5, 30, 30, 100), (90, 90, 112, 110, 101), (300, 40, 340, 60, 102), (180, 310, 199, 330, 103)]
        given = image(350, 400, *objects)
        assert found(Ways(tiles=128), given, batch_size=batch_size) == [(o[4] - 100, list(o[:4])) for o in objects]

    def test_what_a_border_cuts_gives_way_to_the_whole(self):
        given = image(128, 230, (96, 40, 126, 80, 100))  # whole in the first tile, cut in the second
        ways = Ways(tiles=128, overlap=0.2)
        assert [window[0] for window in ways.windows(128, 230)] == [0, 102]
        assert found(ways, given) == [(0, [96, 40, 126, 80])]

    def test_one_that_no_tile_holds_is_there_in_parts(self):
        given = image(128, 400, (20, 40, 380, 80, 100))
        parts = found(Ways(tiles=128), given)
        assert min(box[0] for _, box in parts) == 20
        assert max(box[2] for _, box in parts) == 380

    def test_a_small_image_is_one_tile(self):
        model = Bright()
        assert found(Ways(tiles=512), image(60, 80, (1, 2, 30, 40, 100)), model) == [(0, [1, 2, 30, 40])]
        assert model.seen == [(60, 80)]

    def test_masks_are_put_in_their_places_and_keypoints_moved(self):
        model = Bright(keypoint_names=("a", "b"), masks=True)
        given = image(128, 230, (200, 40, 220, 80, 100), (5, 100, 90, 120, 101))
        one = Ways(tiles=128).detect(model, [given], 1, 0.5)[0]
        assert torch.equal(one.masks, torch.stack([(given[0] == 100 + label) for label in one.labels]).to(torch.uint8))
        assert sorted(one.labels.tolist()) == [0, 1]
        assert one.keypoints[one.labels == 0, :, 0].tolist() == [[200, 220]]
        none = Ways(tiles=128).detect(model, [given], 1, 0.95)[0]
        assert (len(none), none.masks.shape) == (0, (0, 128, 230))
        assert one.fields == {}

    def test_masks_that_no_machine_holds_are_left_out_with_a_word(self, monkeypatch, caplog):
        monkeypatch.setattr("detkernel_export.ways.MOST_MASKS", 128 * 230 - 1)
        given = image(128, 230, (200, 40, 220, 80, 100))
        one = Ways(tiles=128).detect(Bright(masks=True), [given], 1)[0]
        assert (len(one), one.masks) == (1, None)
        assert "masks left out: those of 1 objects in an image of 230x128 take 0.0 GB" in caplog.text


class TestMirrorImages:
    @pytest.mark.parametrize("flip", ["horizontal", "vertical"])
    def test_they_come_back_to_where_they_were(self, flip):
        model = Bright(keypoint_names=("left_eye", "right_eye"), masks=True)
        given = image(60, 100, (10, 5, 40, 20, 101))
        one = Ways(flips=[flip]).detect(model, [given], 2)[0]
        assert one.boxes.tolist() == [[10, 5, 40, 20]], "both looks are one object"
        assert torch.equal(one.masks[0], (given[0] == 101).to(torch.uint8))
        assert len(model.seen) == 2

    def test_left_is_right_in_a_mirror(self):
        from detkernel_export.ways import _mirrored

        points = torch.tensor([[[30.0, 5, 1], [10.0, 6, 1], [20.0, 9, 1]]])
        given = Detections(
            0, 0, torch.tensor([[5.0, 5, 35, 20]]), torch.ones(1), torch.zeros(1).long(), keypoints=points
        )
        names = ("left_eye", "right_eye", "nose")
        turned = _mirrored(given, "horizontal", torch.zeros(3, 60, 100), names)
        assert turned.keypoints[0].tolist() == [[90, 6, 1], [70, 5, 1], [80, 9, 1]]
        assert turned.boxes.tolist() == [[65, 5, 95, 20]]


class TestSizes:
    def test_each_is_looked_at_and_boxes_are_of_the_image(self):
        model = Bright()
        given = image(60, 100, (10, 10, 50, 30, 200))
        assert found(Ways(scales=[1, 2]), given, model)[-1] == (100, [10, 10, 50, 30])
        assert model.seen == [(60, 100), (120, 200)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tiles": 8}, "tiles: expected a side of at least 32 pixels, got 8"),
        ({"overlap": 1}, "overlap: expected a share from 0 to 0.9, got 1"),
        ({"flips": ["sideways"]}, "flips: expected some of horizontal, vertical, got 'sideways'"),
        ({"scales": [0]}, "scales: expected factors from 0.1 to 10, got 0"),
        ({"scales": []}, "scales: expected at least one factor"),
    ],
)
def test_mistakes_are_told(options, said):
    with pytest.raises(UserError, match=said):
        Ways(**options)
