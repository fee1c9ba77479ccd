"""Drawings: where what is drawn, in which colour, and that it can be read on any image."""

from __future__ import annotations

from collections import UserList
from io import BytesIO

import numpy as np
import pytest
import torch
from detkernel_detection import Annotations, Detections, Target
from detkernel_detection.drawing import Tile, colour, draw, ink, jpeg, png, sheet
from detkernel_detection.drawing.colours import BLACK, WHITE
from detkernel_detection.drawing.objects import style_for
from detkernel_detection.drawing.sheet import PAPER
from detkernel_detection.drawing.text import shown
from PIL import Image

GREY = torch.full((3, 400, 500), 128, dtype=torch.uint8)


def found(boxes, scores=None, labels=None, **extra):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = torch.linspace(0.9, 0.6, len(boxes)) if scores is None else torch.tensor(scores)
    labels = torch.zeros(len(boxes), dtype=torch.long) if labels is None else torch.tensor(labels)
    return Detections(0, 0, boxes, scores, labels, **extra)


def pixels(image):
    return np.asarray(image)


def where(image, own):
    """(x1, y1, x2, y2) of all pixels of a colour."""
    rows, columns = np.nonzero((pixels(image) == own).all(2))
    return (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None


class TestColours:
    def test_classes_differ_for_every_eye(self):
        colours = np.array([colour(label) for label in range(60)])
        assert len(np.unique(colours, axis=0)) == 60
        distances = np.abs(colours[:20, None].astype(int) - colours[None, :20]).sum(2) + 999 * np.eye(20, dtype=int)
        assert distances.min() > 90

    def test_ink_is_read_on_its_paper(self):
        assert (ink((255, 255, 0)), ink((20, 20, 160))) == (BLACK, WHITE)


class TestBoxes:
    def test_a_box_is_where_it_is_and_the_rest_untouched(self):
        image = draw(GREY, found([[100, 80, 300, 240]]), ["cell"])
        for at in ((100, 160), (300, 160), (200, 240), (200, 80)):
            assert image.getpixel(at) == colour(0)
        assert image.getpixel((200, 160)) == (128, 128, 128)
        assert image.getpixel((99, 160)) == BLACK, "a halo"
        assert image.size == (500, 400)

    def test_the_best_lies_on_top(self):
        image = draw(GREY, found([[100, 80, 300, 240]] * 2, scores=[0.7, 0.9], labels=[1, 2]), ["a", "b", "c"])
        assert image.getpixel((100, 160)) == colour(2)

    def test_truth_is_dashed_over_it_so_that_both_are_seen(self):
        boxes = [[100, 80, 300, 240]]
        notes = Target(torch.tensor(boxes, dtype=torch.float32), torch.tensor([1]))
        column = pixels(draw(GREY, found(boxes), ["a", "b"], truth=notes))[110:230, 100]
        assert {tuple(pixel) for pixel in column.tolist()} == {WHITE, colour(0)}

    def test_boxes_gone_astray(self):
        nan, inf = float("nan"), float("inf")
        boxes = [[nan, 0, 9, 9], [0, 0, inf, 9], [-1e30, 200, 1e30, 1e30], [90, 90, 10, 10]]
        image = draw(GREY, found(boxes, labels=[0, 0, 1, 2]), [])
        assert (pixels(image)[200] == colour(1)).all(1).mean() > 0.9, "the one edge that crosses the image"
        assert where(image, colour(0)) is None

    def test_what_has_no_scores_is_drawn_with_its_class_alone(self):
        one = np.array([[100.0, 80, 300, 240]])
        no = np.zeros(1, dtype=bool)
        notes = Annotations(1, "a.jpg", 400, 500, one, np.array([1]), np.ones(1), no, no)
        assert draw(GREY, notes, ["a", "b"]).getpixel((100, 160)) == colour(1)

    def test_lines_and_letters_go_by_the_image_and_its_objects(self):
        large, small = np.array([[0, 0, 1000.0, 1000]]), np.array([[0, 0, 12.0, 12]])
        assert style_for((500, 400), np.zeros((0, 4))).line == 2
        assert style_for((6400, 4000), large).line == 20
        assert style_for((6400, 4000), large).font > 100
        assert style_for((6400, 4000), small)[:2] == (1, 11)


class TestImages:
    @pytest.mark.parametrize("size", [(1, 1), (3, 200), (24, 32)])
    def test_a_tiny_one_is_enlarged(self, size):
        image = draw(np.full((*size, 3), 90, np.uint8), found([[0, 0, size[1], size[0]]]), ["a"])
        assert 320 <= max(image.size) < 640
        assert image.width * size[0] == image.height * size[1]

    def test_a_grey_one_and_one_of_pillow(self):
        for image in (np.zeros((50, 400), np.uint8), np.zeros((50, 400, 1), np.uint8), Image.new("L", (400, 50))):
            assert draw(image, found([[5, 5, 40, 40]]), ["a"]).mode == "RGB"

    def test_it_is_scaled_with_all_on_it(self):
        image = draw(GREY, found([[100, 80, 300, 240]]), ["a"], longest=1000)
        assert image.size == (1000, 800)
        assert image.getpixel((200, 320)) == colour(0)

    def test_the_image_given_stays_as_it_is(self):
        given = Image.new("RGB", (400, 400))
        draw(given, found([[10, 10, 200, 200]]), ["a"])
        assert given.getbbox() is None


class TestMasksAndKeypoints:
    def test_a_mask_is_a_veil_with_an_edge(self):
        mask = torch.zeros(1, 400, 500, dtype=torch.uint8)
        mask[:, 120:180, 160:240] = 1
        image = draw(GREY, found([[150, 100, 250, 200]], masks=mask), [], longest=1000)
        veil = tuple(round(0.6 * 128 + 0.4 * level) for level in colour(0))
        assert where(image, veil) == (321, 241, 478, 358)
        assert image.getpixel((320, 300)) == image.getpixel((479, 300)) == colour(0)
        assert image.getpixel((310, 300)) == (128, 128, 128)

    def test_masks_of_annotations_are_not_decoded(self):
        """COCO's are a sequence of its own, which decodes when it is asked: the boxes are drawn, as of any list."""

        class View(UserList):
            def __getitem__(self, number):
                raise AssertionError("it was decoded")

        box = np.array([[100.0, 80, 300, 240]])
        none = np.zeros(1, dtype=bool)
        notes = Annotations(0, "a.jpg", 400, 500, box, np.zeros(1, dtype=np.int64), np.ones(1), none, none)
        drawn = []
        for notes.masks in (None, [[[0, 0, 9, 0, 9, 9]]], View([1])):
            drawn.append(pixels(draw(GREY, found([]), [], truth=notes)))
        assert all(np.array_equal(one, drawn[0]) for one in drawn)

    def test_keypoints_and_a_persons_lines(self):
        points = torch.tensor([[[120.0, 100, 1], [280, 100, 1], [200, 200, 0], [float("nan"), 0, 1]]])
        person = found([[100, 80, 300, 240]], keypoints=points)
        named = draw(GREY, person, [], keypoint_names=["left_shoulder", "right_shoulder", "nose", "left_hip"])
        assert named.getpixel((120, 100)) == named.getpixel((200, 100)) == colour(0)
        assert named.getpixel((200, 200)) == (128, 128, 128), "0: not labelled"
        assert draw(GREY, person, []).getpixel((200, 100)) == (128, 128, 128)


class TestLabels:
    def papers(self, image, label=0):
        """Pixels of a class's colour: more than a line, a label."""
        return int((pixels(image) == colour(label)).all(2).sum())

    def test_no_label_covers_another(self):
        boxes = [[100, 80, 300, 240], [100, 82, 300, 242], [100, 84, 300, 244]]
        image = pixels(draw(GREY, found(boxes, labels=[1, 2, 3]), ["x", "one", "two", "three"]))
        areas = [(image == colour(label)).all(2).sum() for label in (1, 2, 3)]
        assert min(areas) > 500, "each has a label"

    def test_it_stays_in_the_image(self):
        for box in ([0, 0, 500, 400], [450, 0, 500, 20], [-50, -50, 40, 40], [480, 380, 600, 500]):
            assert self.papers(draw(GREY, found([box]), ["a name"])) > 500

    def test_small_objects_of_a_crowd_go_without(self):
        boxes = [[x, y, x + 9, y + 9] for x in range(20, 480, 24) for y in range(20, 380, 20)]
        image = draw(GREY, found(boxes, scores=[0.5] * len(boxes)), ["a long name"])
        assert self.papers(image) <= len(boxes) * 36, "lines alone"
        alone = draw(GREY, found(boxes[:1], scores=[0.5]), ["a long name"])
        assert self.papers(alone) > 500

    @pytest.mark.parametrize(
        "name",
        ["evil\nclass", "\x1b]0;PWN\x07", "\ud800x", "../../x/y", " ", "", "\u6f22\u5b57", "\u202ecba", "x" * 5000],
    )
    def test_any_name_can_be_drawn(self, name):
        assert self.papers(draw(GREY, found([[100, 80, 300, 240]]), [name])) > 500
        assert shown(name).isprintable()
        assert len(shown(name)) <= 80

    def test_a_label_that_no_class_has(self):
        assert self.papers(draw(GREY, found([[100, 80, 300, 240]], labels=[7]), ["a"]), 7) > 500


class TestSheet:
    def test_tiles_stand_in_rows(self):
        made = sheet([Tile(Image.new("RGB", (64, 48), (level, 0, 0))) for level in (50, 100, 150)], 2)
        assert made.size == (320, 12 + 2 * (48 + 12))
        assert [made.getpixel(at) for at in ((12, 12), (88, 12), (12, 72))] == [(50, 0, 0), (100, 0, 0), (150, 0, 0)]
        assert made.getpixel((88, 72)) == PAPER

    def test_it_has_a_head_a_legend_and_captions(self):
        tiles = [Tile(Image.new("RGB", (400, 100)), "a/very/long/" * 20 + "name.jpg")]
        plain = sheet([Tile(tiles[0].image)], 1)
        made = sheet(
            tiles, 1, title="Iteration 3", notes=["word " * 60], alerts=["Nothing"], classes=[(4, "cat")], truth=True
        )
        assert made.height > plain.height + 5 * 22
        assert where(made, colour(4)) is not None
        assert where(made, (255, 196, 84)) is not None
        assert where(made, (176, 182, 192))[2] < made.width

    def test_no_tile_and_many_classes(self):
        made = sheet([], 3, title="Nothing", classes=[(label, f"class {label}") for label in range(40)])
        assert made.width == 344
        assert made.height > 10 * 25

    def test_files(self):
        image = Image.new("RGB", (8, 8), (200, 10, 10))
        for data, kind in ((png(image), "PNG"), (jpeg(image), "JPEG")):
            with Image.open(BytesIO(data)) as opened:
                assert (opened.format, opened.size) == (kind, (8, 8))
