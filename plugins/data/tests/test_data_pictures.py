"""Picture files: every kind that is read, every way to be broken, and no warning on the way."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detkernel import DataError
from detkernel_data._pictures import Header, Listing, decode, picture_files, read_headers, turn_upright
from PIL import Image, ImageOps

Picture = Callable[..., Path]


def reference(path: Path, apply_exif: bool = False) -> torch.Tensor:
    """What Pillow makes of it."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture) if apply_exif else picture
        return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)


def header(path: Path) -> Header:
    (found,) = read_headers([str(path)])
    assert isinstance(found, Header)
    return found


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        decode(str(path), apply_exif=False)
    return str(refused.value)


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *[("png", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")],
        *[("jpg", mode) for mode in ("RGB", "L", "CMYK")],
        *[("bmp", mode) for mode in ("RGB", "L", "P")],
        *[("tif", mode) for mode in ("RGB", "RGBA", "L", "CMYK")],
        *[("gif", mode) for mode in ("RGB", "P")],
        *[("webp", mode) for mode in ("RGB", "RGBA")],
        *[("ppm", mode) for mode in ("RGB", "L")],
    ],
)
def test_every_kind_becomes_rgb(here: Path, picture: Picture, suffix: str, mode: str) -> None:
    path = picture(here / f"a.{suffix}", 40, 30, mode=mode)
    assert header(path)[:3] == (30, 40, 1)
    image = decode(str(path), apply_exif=False)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 30, 40)
    assert image.permute(1, 2, 0).is_contiguous(), "channels-last in memory"
    assert torch.equal(image, reference(path))


def test_a_palette_with_a_transparent_colour(here: Path) -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    for suffix in ("gif", "png"):
        picture.save(here / f"a.{suffix}", transparency=1)
        assert decode(str(here / f"a.{suffix}"), apply_exif=False)[:, 0, 0].tolist() == [200, 100, 50]


@pytest.mark.parametrize("depth", ["I;16", "RGB"])
def test_pngs_of_16_bits_keep_their_upper_8(here: Path, depth: str) -> None:
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    if depth == "RGB":
        (here / "a.png").write_bytes(png(256, 256, 2, 16, np.repeat(values[..., None], 3, axis=2).astype(">u2")))
    else:
        Image.fromarray(values).save(here / "a.png")
    image = decode(str(here / "a.png"), apply_exif=False)
    assert torch.equal(image, torch.from_numpy(values >> 8).to(torch.uint8).expand(3, -1, -1))


def test_other_deep_pictures_are_refused(here: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(here / "a.tif")
    assert refusal(here / "a.tif") == "a.tif: F pixels; expected 8 bits a channel; convert the picture"
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(here / "b.tif")
    assert refusal(here / "b.tif").startswith("b.tif: I;16 pixels; expected 8 bits")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_on_request_only(
    here: Path, picture: Picture, suffix: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = picture(here / f"a.{suffix}", exif=exif)
    found = header(path)
    assert found[:3] == (30, 40, orientation)
    assert found.upright() == ((40, 30) if orientation >= 5 else (30, 40))
    assert torch.equal(decode(str(path), apply_exif=False), reference(path))
    upright = decode(str(path), apply_exif=True)
    assert torch.equal(upright, reference(path, apply_exif=True))
    assert upright.permute(1, 2, 0).is_contiguous(), "channels-last in memory"


def test_tiffs_are_always_upright(here: Path, picture: Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = picture(here / "a.tif", exif=exif)
    assert header(path)[:3] == (40, 30, 1)
    for apply_exif in (False, True):
        assert torch.equal(decode(str(path), apply_exif), reference(path))


def test_an_orientation_that_is_none(here: Path, picture: Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert header(picture(here / "a.jpg", exif=exif)).orientation == 1
    path = picture(here / "b.jpg", exif=b"Exif\0\0broken")
    assert header(path).orientation == 1
    image = torch.zeros(3, 2, 4)
    assert turn_upright(image, 1) is image


def test_headers_do_not_decode(here: Path) -> None:
    """A PNG of 10,000 x 8,000 pixels whose pixels are missing: only its header is looked at."""
    (here / "a.png").write_bytes(png(10_000, 8_000, 0, 8, b"")[:50])
    assert header(here / "a.png") == (8_000, 10_000, 1, "PNG")


def test_headers_of_many_keep_their_order(here: Path, picture: Picture) -> None:
    paths = [str(picture(here / f"{side}.bmp", side, 5)) for side in range(1, 150)]
    paths.insert(70, str(here / "none.jpg"))
    found = read_headers(paths)
    assert str(found.pop(70)) == "none.jpg: the picture cannot be read (No such file or directory)"
    assert [one.width for one in found if isinstance(one, Header)] == list(range(1, 150))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp"])
@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_pictures(here: Path, picture: Picture, suffix: str, kept: float) -> None:
    path = picture(here / f"a.{suffix}", 200, 200)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    told = refusal(path)
    assert told.startswith(f"a.{suffix}: ")
    assert told.endswith("; replace the file")
    assert "\n" not in told


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF", b"no picture at all"])
def test_files_that_are_no_pictures(here: Path, data: bytes) -> None:
    (here / "a.jpg").write_bytes(data)
    assert refusal(here / "a.jpg").startswith("a.jpg: ")
    (found,) = read_headers(["a.jpg"])
    assert isinstance(found, DataError)
    assert str(found) == refusal(here / "a.jpg")


def test_folders_and_names_that_cannot_be(here: Path) -> None:
    assert refusal(here / "none.jpg") == "none.jpg: the picture cannot be read (No such file or directory)"
    (here / "a.jpg").mkdir()
    assert refusal(here / "a.jpg") == "a.jpg: the picture cannot be read (Is a directory)"
    (found,) = read_headers(["a\0.jpg"])
    assert isinstance(found, DataError)
    assert not Listing()("a\0/b.jpg")
    assert not Listing()("none/b.jpg")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_bombs_are_refused_before_they_are_decoded(here: Path, side: int) -> None:
    (here / "a.png").write_bytes(png(side, side, 0, 8, b""))
    message = "a.png: the picture has more than 89,478,485 pixels; cut it into tiles"
    for action in ("ignore", "error"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)  # type: ignore[arg-type]
            assert refusal(here / "a.png") == message
            assert [str(found) for found in read_headers(["a.png"])] == [message]


def test_picture_files_of_a_folder(here: Path, picture: Picture) -> None:
    for name in ("a.jpg", "b.JPG", "c.Png"):
        picture(here / name, format="png")
    (here / "notes.txt").write_text("")
    assert sorted(picture_files(here)) == ["a.jpg", "b.JPG", "c.Png"]


def test_warning_filters_are_left_alone(here: Path, picture: Picture) -> None:
    paths = [str(picture(here / f"{number}.png")) for number in range(200)]
    before = list(warnings.filters)
    read_headers(paths)
    decode(paths[0], apply_exif=False)
    assert warnings.filters == before


def png(width: int, height: int, colour: int, depth: int, pixels: bytes | np.ndarray) -> bytes:
    """A PNG file of unfiltered rows; of too few, if `pixels` is empty."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in pixels) if isinstance(pixels, np.ndarray) else pixels
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
