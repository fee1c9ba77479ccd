import pytest
import torch
from detkernel import ConfigError, UserError
from detkernel_data.transforms import color, geometry
from detkernel_data.transforms.standard import V2, Color, Crop, Expand, Flip, MinIouCrop, Normalize, Pad, Resize
from detkernel_detection import Sample, Target
from detkernel_detection.testing import TinyDataset, TransformContract
from torchvision.transforms.v2 import functional as F


def sample(height=40, width=60):
    """A dark image with two bright rectangles, which are its objects; a mask and a keypoint mark each."""
    image = torch.full((height, width, 3), 10, dtype=torch.uint8).permute(2, 0, 1)
    boxes = torch.tensor([[4.0, 6, 20, 16], [30, 20, 50, 38]])
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        image[:, y1:y2, x1:x2] = 200
        mask[y1:y2, x1:x2] = 1
    points = torch.tensor([[[4.0, 6, 2], [20, 16, 1]], [[30, 20, 2], [0, 0, 0]]])
    return Sample(image, Target(boxes, torch.tensor([0, 1]), masks, points), 0, 0, (height, width))


def bright(found):
    """[N, 4] the boxes that masks give, and whether the image is bright exactly there."""
    masks = found.target.masks.bool()
    assert torch.equal(masks.any(0), found.image[0] > 100)
    boxes = []
    for mask in masks:
        y, x = mask.nonzero().unbind(1)
        boxes.append([x.min(), y.min(), x.max() + 1, y.max() + 1])
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"short": 20}, (20, 30)),
        ({"short": 80, "long": 90}, (60, 90)),
        ({"long": 30}, (20, 30)),
        ({"size": (10, 10)}, (10, 10)),
        ({"short": [20]}, (20, 30)),
    ],
)
def test_resize(options, expected):
    found = Resize(**options)(sample())
    assert found.size == expected
    y, x = expected[0] / 40, expected[1] / 60
    assert found.scale == pytest.approx((y, x))
    torch.testing.assert_close(found.target.boxes[0], torch.tensor([4 * x, 6 * y, 20 * x, 16 * y]))
    torch.testing.assert_close(found.target.keypoints[0, 1], torch.tensor([20 * x, 16 * y, 1]))
    assert found.target.masks.shape[1:] == expected
    assert found.image.dtype == torch.uint8
    assert found.image.permute(1, 2, 0).is_contiguous()


def test_resize_is_torchvisions():
    expected = F.resize(sample().image, [23, 31], antialias=True)
    assert torch.equal(Resize(size=(23, 31))(sample()).image, expected)


def test_resize_draws_among_several_sides():
    torch.manual_seed(0)
    assert {Resize(short=[20, 30, 40])(sample()).size for _ in range(30)} == {(20, 30), (30, 45), (40, 60)}


def test_resize_draws_a_factor():
    torch.manual_seed(0)
    resize = Resize(long=60, factor=(0.5, 2.0))
    sides = [resize(sample()).size for _ in range(50)]
    assert 30 <= min(width for _, width in sides) < 40
    assert 100 < max(width for _, width in sides) <= 120
    assert all(abs(height - width * 2 / 3) < 1 for height, width in sides)
    assert resize.output_size((40, 60)) == (80, 120)
    assert Resize(size=(40, 10), factor=(1.5, 1.5))(sample()).size == (60, 15)
    with pytest.raises(ValueError, match="factor: expected the smaller number first, got"):
        Resize(long=60, factor=(2.0, 0.5))


def test_pad_makes_an_image_larger_at_the_right_and_the_bottom():
    found = Pad(size=(64, 50), fill=(1, 2, 3))(sample())
    assert found.size == (64, 60)
    assert torch.equal(found.image[:, :40], sample().image)
    assert found.image[:, 40:].flatten(1).unique(dim=1).tolist() == [[1], [2], [3]]
    assert torch.equal(found.target.boxes, sample().target.boxes)
    assert torch.equal(bright(found), found.target.boxes)
    assert found.scale == (1, 1)
    assert Pad(size=(64, 50)).output_size((40, 60)) == (64, 60)
    assert Pad(size=(64, 50)).output_size(None) is None
    assert Pad(size=(64, 50))(sample()).image[:, -1, -1].tolist() == [114] * 3


@pytest.mark.parametrize("options", [{}, {"size": (3, 4), "short": 3}, {"short": []}])
def test_resize_says_what_it_needs(options):
    with pytest.raises(ValueError, match=r"size: give either|short: expected at least one"):
        Resize(**options)


@pytest.mark.parametrize("direction", ["horizontal", "vertical"])
def test_flip_moves_everything_together(direction):
    found = Flip(probability=1, direction=direction)(sample())
    assert torch.equal(bright(found), found.target.boxes)
    axis = -1 if direction == "horizontal" else -2
    assert torch.equal(found.image, sample().image.flip(axis))
    again = Flip(probability=1, direction=direction)(found)
    assert torch.equal(again.target.boxes, sample().target.boxes)
    assert torch.equal(again.target.keypoints, sample().target.keypoints)


def test_flip_swaps_left_and_right_keypoints():
    dataset = TinyDataset()
    dataset.keypoint_names = ("left_eye", "right_eye")
    flip = Flip(probability=1)
    flip.prepare(dataset)
    points = flip(sample()).target.keypoints
    assert points[0].tolist() == [[40, 16, 1], [56, 6, 2]]


def test_flip_both_ways_is_one_of_three():
    torch.manual_seed(0)
    corners = {tuple(Flip(probability=1, direction="both")(sample()).target.boxes[0].tolist()) for _ in range(30)}
    assert len(corners) == 3


def test_flip_by_share():
    torch.manual_seed(0)
    flipped = [Flip(probability=0.3)(sample()).target.boxes[0, 0].item() != 4 for _ in range(300)]
    assert 60 < sum(flipped) < 120


@pytest.mark.parametrize("transform", [Crop(), Crop(size=(25, 25)), MinIouCrop(), Expand(probability=1)])
def test_windows_keep_objects_with_their_pixels(transform):
    for seed in range(40):
        torch.manual_seed(seed)
        found = transform(sample())
        height, width = found.size
        boxes = found.target.boxes
        assert found.image.shape[1:] == found.target.masks.shape[1:] == (height, width)
        for box, mask in zip(boxes, found.target.masks, strict=True):
            x1, y1, x2, y2 = box.int().tolist()
            assert 0 <= x1 < x2 <= width
            assert 0 <= y1 < y2 <= height
            assert int(mask.sum()) == (x2 - x1) * (y2 - y1) == int(mask[y1:y2, x1:x2].sum())
        shown = found.target.keypoints[found.target.keypoints[..., 2] > 0]
        assert bool(((shown[:, :2] >= 0) & (shown[:, :2] <= torch.tensor([width, height]))).all())


def test_crop_drops_what_is_hardly_seen():
    found = geometry.crop(sample(), (18, 0, 60, 40), torch.tensor([False, True]))
    assert found.target.labels.tolist() == [1]
    assert found.target.boxes.tolist() == [[12, 20, 32, 38]]
    assert geometry.visible_share(sample().target.boxes, (18, 0, 60, 40)).tolist() == pytest.approx([2 / 16, 1])


def test_min_iou_crop_reaches_the_overlap_that_it_drew():
    for seed in range(20):
        torch.manual_seed(seed)
        found = MinIouCrop(overlaps=[0.5])(sample())
        if found.size != (40, 60):
            area = found.size[0] * found.size[1]
            assert bool((geometry.area(found.target.boxes) / area).max() > 0.3)


def test_color_without_change_is_the_identity_and_hue_keeps_grey():
    image = sample().image
    assert color.jitter(image, (0, 0, 0, 0), 1.0) is image
    matrix, offset = color.affine((0, 0, 0, 0), mean=100.0)
    torch.testing.assert_close(matrix, torch.eye(3), atol=1e-4, rtol=0)
    assert offset.abs().max() < 1e-4
    turned, _ = color.affine((0, 0, 0, 0.3), mean=100.0)
    torch.testing.assert_close(turned @ torch.full((3,), 50.0), torch.full((3,), 50.0), atol=1e-2, rtol=0)
    grey, _ = color.affine((0, 0, -1, 0), mean=100.0)
    torch.testing.assert_close(grey @ torch.tensor([10.0, 200, 30]), torch.full((3,), 123.81), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("place", "function"), [(0, F.adjust_brightness), (1, F.adjust_contrast), (2, F.adjust_saturation)]
)
def test_color_is_torchvisions_up_to_rounding(place, function):
    torch.manual_seed(0)
    image = torch.randint(60, 190, (3, 20, 30), dtype=torch.uint8)
    change = [0.0] * 4
    change[place] = 0.2
    mean = float(image.permute(1, 2, 0).float().mean((0, 1)) @ color.GREY)
    matrix, offset = color.affine(change, mean)
    ours = (torch.einsum("ij,jhw->ihw", matrix, image.float()) + offset[:, None, None]).clamp(0, 255)
    assert (ours - function(image, 1.2).float()).abs().max() <= 1.5


def test_color_keeps_uint8_channels_last():
    torch.manual_seed(0)
    found = Color(probability=1)(sample())
    assert found.image.dtype == torch.uint8
    assert found.image.permute(1, 2, 0).is_contiguous()
    assert not torch.equal(found.image, sample().image)


def test_normalize():
    found = Normalize(mean=(10, 10, 10), std=(2, 4, 5))(sample()).image
    assert found.dtype == torch.float32
    assert found[:, 0, 0].tolist() == [0, 0, 0]
    assert found[:, 7, 5].tolist() == pytest.approx([95, 47.5, 38])


def test_v2_by_name():
    given = sample()
    given.target.keypoints = None
    found = V2(name="RandomHorizontalFlip", args={"p": 1.0})(given)
    assert torch.equal(bright(found), found.target.boxes)
    assert type(found.image) is torch.Tensor


def test_v2_leaves_out_objects_that_it_cuts_away():
    found = V2(name="CenterCrop", args={"size": [10, 10]})(sample())
    assert len(found.target.boxes) == len(found.target.labels) == len(found.target.masks)
    assert found.size == (10, 10)


def test_v2_moves_keypoints():
    found = V2(name="RandomRotation", args={"degrees": [180, 180]})(sample())
    expected = torch.tensor([[[56.0, 34, 2], [40, 24, 1]], [[30, 20, 2], [0, 0, 0]]])
    torch.testing.assert_close(found.target.keypoints, expected, atol=1, rtol=0)
    cropped = V2(name="CenterCrop", args={"size": [20, 30]})(sample())
    torch.testing.assert_close(cropped.target.keypoints[-1], torch.tensor([[15.0, 10, 2], [0, 0, 0]]))
    with pytest.raises(UserError, match="RandomHorizontalFlip does not swap left and right keypoints; use `flip`"):
        V2(name="RandomHorizontalFlip")(sample())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "RandomGreyscale"},
            "torchvision.transforms.v2 has no 'RandomGreyscale' that fits here, did you mean",
        ),
        ({"name": "Compose"}, "has no 'Compose' that fits here"),
        ({"name": "RandomGrayscale", "args": {"pp": 0.1}}, "RandomGrayscale has no argument 'pp', did you mean 'p'"),
        ({"name": "RandomGrayscale", "args": {"p": 7}}, "RandomGrayscale"),
        ({"name": "CenterCrop"}, "missing a required argument: 'size'"),
    ],
)
def test_v2_says_what_is_wrong(options, message):
    with pytest.raises(ConfigError, match=message):
        V2(**options).prepare(TinyDataset())


class TestFlip(TransformContract):
    def transform(self):
        return Flip()


class TestCrop(TransformContract):
    def transform(self):
        return Crop()


class TestColor(TransformContract):
    def transform(self):
        return Color()


class TestV2(TransformContract):
    def transform(self):
        return V2(name="RandomRotation", args={"degrees": 20})
