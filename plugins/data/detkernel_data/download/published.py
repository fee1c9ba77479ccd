"""What can be downloaded, where it is published, and how large it is.

Their authors publish no MD5 sums. Those here are what many projects that download these sets compare with (torchvision
for VOC). Where `md5` is empty, there is none that is known: the size is compared, and the checksums inside the archive.
"""

from __future__ import annotations

from pathlib import Path

import attrs

_VOC = "http://host.robots.ox.ac.uk/pascal/VOC/"
_COCO = "http://images.cocodataset.org/"
_LVIS = "https://dl.fbaipublicfiles.com/LVIS/"


@attrs.frozen
class File:
    """One archive."""

    url: str
    size: int
    """Bytes; 0: the authors state none, and the server is asked."""
    md5: str = ""
    into: str = "."
    """The folder, below that of the set, in which it is unpacked."""
    proof: str = ""
    """A file or folder that is there, below that of the set, once it is unpacked."""

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


@attrs.frozen
class Published:
    """A data set."""

    about: str
    folder: str
    """Below the folder that all sets are downloaded into: where the recipes look for it."""
    files: tuple[File, ...]
    licence: str

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


_ANNOTATIONS2017 = File(
    f"{_COCO}annotations/annotations_trainval2017.zip", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c",
    proof="annotations/instances_val2017.json",
)  # fmt: skip
_TRAIN2017 = File(f"{_COCO}zips/train2017.zip", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", proof="train2017")
_VAL2017 = File(f"{_COCO}zips/val2017.zip", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", proof="val2017")

SETS: dict[str, Published] = {
    "voc2007": Published(
        "Pascal VOC 2007: 20 classes, 9,963 images",
        ".",
        (
            File(
                f"{_VOC}voc2007/VOCtrainval_06-Nov-2007.tar",
                460_032_000,
                "c52e279531787c972589f7e41ab4ae64",
                proof="VOCdevkit/VOC2007/ImageSets/Main/trainval.txt",
            ),
            File(
                f"{_VOC}voc2007/VOCtest_06-Nov-2007.tar",
                451_020_800,
                "b6e924de25625d8de591ea690078ad9f",
                proof="VOCdevkit/VOC2007/ImageSets/Main/test.txt",
            ),
        ),
        "images from flickr, under flickr's terms of use",
    ),
    "voc2012": Published(
        "Pascal VOC 2012, trainval: 20 classes, 11,540 images with objects",
        ".",
        (
            File(
                f"{_VOC}voc2012/VOCtrainval_11-May-2012.tar",
                1_999_639_040,
                "6cd6e144f989b92b3379bac3b3de84fd",
                proof="VOCdevkit/VOC2012/ImageSets/Main/trainval.txt",
            ),
        ),
        "images from flickr, under flickr's terms of use",
    ),
    "coco2017": Published(
        "COCO 2017: 80 classes, 118,287 images to train on and 5,000 to validate on",
        "coco",
        (_ANNOTATIONS2017, _VAL2017, _TRAIN2017),
        "annotations CC BY 4.0; images from flickr, under their own licences",
    ),
    "coco2017-val": Published(
        "COCO 2017: the 5,000 images to validate on, and all annotations",
        "coco",
        (_ANNOTATIONS2017, _VAL2017),
        "annotations CC BY 4.0; images from flickr, under their own licences",
    ),
    "coco128": Published(
        "the first 128 images of COCO's training data, with labels in YOLO form: for trials",
        ".",
        (
            File(
                "https://github.com/ultralytics/assets/releases/download/v0.0.0/coco128.zip",
                0,
                proof="coco128/labels",
            ),
        ),
        "annotations CC BY 4.0; images from flickr, under their own licences",
    ),
    "lvis": Published(
        "LVIS v1: 1,203 classes, on COCO's images",
        "coco",
        (
            File(
                f"{_LVIS}lvis_v1_val.json.zip",
                64_026_968,
                "87734a7f895990b9552075d7ce723e27",
                into="annotations",
                proof="annotations/lvis_v1_val.json",
            ),
            File(
                f"{_LVIS}lvis_v1_train.json.zip",
                350_264_821,
                "4410d837f71203af226950447ef9d422",
                into="annotations",
                proof="annotations/lvis_v1_train.json",
            ),
            _VAL2017,
            _TRAIN2017,
        ),
        "annotations CC BY 4.0; images from flickr, under their own licences",
    ),
}


def hint(path: Path) -> str:
    """What to say behind `there is no such file`, for data that can be downloaded; else nothing."""
    words = str(path)
    names = {
        "voc2007": ("VOC2007",),
        "voc2012": ("VOC2012",),
        "lvis": ("lvis_v1_",),
        "coco2017": ("instances_train2017", "instances_val2017", "person_keypoints_"),
    }
    for name, parts in names.items():
        if any(part in words for part in parts):
            return f"; `detkernel download {name}` fetches it into data/ (`--into` another folder)"
    return ""
