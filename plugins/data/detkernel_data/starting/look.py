"""Looks at a folder, or a file, of whatever form, and says which data sets it holds."""

from __future__ import annotations

import mmap
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import yaml
from detkernel import DataError
from detkernel.errors import printable, relative
from detkernel.files import open_regular, read_regular
from detkernel_detection.images import SUFFIXES

from detkernel_data.formats.labelme import is_labelme, read_json
from detkernel_data.formats.missing_files import fold, walk
from detkernel_data.formats.yolo import label_file
from detkernel_data.report import counted

FORMS = {"voc": "Pascal VOC", "coco": "COCO", "yolo": "YOLO", "labelme": "LabelMe"}
MOST_FILES = 1_000_000
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_OTHER_TEXTS = {"classes.txt", "labels.txt", "obj.names", "readme.txt", "requirements.txt", "license.txt"}
_LABEL = re.compile(rb"\s*[0-9]{1,6}(\s+-?[0-9.]+(e-?[0-9]+)?){4,}\s*", re.IGNORECASE)
_SMALL_JSON = 2**20
_SAMPLED = 200


@attrs.define
class Part:
    """Data of one split (or of none, yet) as a data set plugin reads it."""

    split: str
    """train, val or test; empty where nothing says."""
    use: str
    """The installed name of the data set."""
    options: dict[str, Any]


@attrs.define
class Found:
    """What lies at a path."""

    place: Path
    form: str
    """A key of `FORMS`, or empty for images without annotations."""
    parts: list[Part] = attrs.field(factory=list)
    remarks: list[str] = attrs.field(factory=list)
    """What was passed over, and why."""
    names: list[str] | None = None
    """For YOLO labels without a data.yaml that can be read: the class names, to be written into one."""
    images: list[str] = attrs.field(factory=list)
    """All image files below the path."""


@attrs.define
class _Tree:
    """The files below a folder, by kind."""

    top: Path
    images: list[str] = attrs.field(factory=list)
    xml: list[str] = attrs.field(factory=list)
    json: list[str] = attrs.field(factory=list)
    texts: list[str] = attrs.field(factory=list)
    yaml: list[str] = attrs.field(factory=list)
    archives: list[str] = attrs.field(factory=list)


def look(path: Path) -> Found:
    """What there is at a path. Raises `DataError` where nothing can be made of it."""
    if not path.exists():
        near = sorted(entry.name for entry in path.parent.iterdir())[:12] if path.parent.is_dir() else []
        there = f"; {relative(path.parent)} has {', '.join(map(printable, near))}" if near else ""
        raise DataError(f"{relative(path)}: there is no such file or folder{there}")
    if not path.is_dir():
        return _of_file(path)
    tree = _list(path)
    for find in (_yolo_yaml, _coco, _voc, _labelme, _yolo_folders):
        found = find(tree)
        if found is not None:
            found.images = tree.images
            return found
    if not tree.images:
        raise DataError(_nothing(tree))
    return Found(path, "", images=tree.images)


def split_in(text: str) -> str:
    """The split that a file's or folder's name tells: `instances_val2017` is val; empty where it tells none."""
    words = re.findall(r"[a-z]+", text.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def _of_file(path: Path) -> Found:
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        found = _yolo_yaml(_Tree(path.parent, yaml=[str(path)], images=_list(path.parent).images))
        if found is None:
            raise DataError(f"{relative(path)}: it has no `names` and no `train`: not the data.yaml of YOLO's form")
        return found
    if suffix == ".json":
        kind = json_kind(path)
        if kind == "labelme":
            return look(path.parent)
        if kind != "coco":
            raise DataError(
                f"{relative(path)}: neither `images`, `annotations` and `categories`, as COCO and LVIS have, nor "
                "`shapes` and `imagePath`, as LabelMe has"
            )
        found = _coco(_Tree(path.parent, json=[str(path)]))
        assert found is not None
        return found
    if suffix in _ARCHIVES or zipfile.is_zipfile(path):
        raise DataError(
            f"{relative(path)}: this is an archive; unpack it first (`python -m zipfile -e FILE.zip FOLDER`, or "
            "`tar -xf FILE.tar`), and give the folder"
        )
    if suffix == ".xml" or suffix in SUFFIXES:
        raise DataError(f"{relative(path)}: this is one file; give the folder that it lies in, {relative(path.parent)}")
    raise DataError(
        f"{relative(path)}: expected a folder, a data.yaml, or a JSON file of COCO's, LVIS's or LabelMe's form"
    )


def _list(top: Path) -> _Tree:
    tree = _Tree(top)
    by_suffix = {".xml": tree.xml, ".json": tree.json, ".txt": tree.texts, ".yaml": tree.yaml, ".yml": tree.yaml}
    count = 0
    for folder, names in walk(top):
        count += len(names)
        if count > MOST_FILES:
            raise DataError(f"{relative(top)}: more than {MOST_FILES:,} files in it; give the folder of one data set")
        for name in names:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - called for many files
            kind = by_suffix.get(suffix)
            if suffix in SUFFIXES and not name.startswith("._"):  # what macOS leaves in archives is no image
                tree.images.append(os.path.join(folder, name))  # noqa: PTH118
            elif kind is not None and not name.startswith("._"):
                kind.append(os.path.join(folder, name))  # noqa: PTH118
            elif suffix in _ARCHIVES:
                tree.archives.append(os.path.join(folder, name))  # noqa: PTH118
    return tree


def _nothing(tree: _Tree) -> str:
    shown = relative(tree.top)
    if tree.archives:
        archives = ", ".join(relative(file) for file in tree.archives[:3])
        return f"{shown}: there is no image in it, but {archives}: unpack that first, and run this again"
    others = [kind for kind in ("xml", "json", "texts", "yaml") if getattr(tree, kind)]
    if others:
        files = ", ".join(relative(getattr(tree, kind)[0]) for kind in others)
        return f"{shown}: there is no image in it, only such files as {files}; give a folder that has the images too"
    return f"{shown}: there is no image in this folder, or below it"


# YOLO


def _yolo_yaml(tree: _Tree) -> Found | None:
    for file in sorted(tree.yaml, key=lambda name: (name.count(os.sep), not name.endswith("data.yaml"))):
        content = _small_yaml(Path(file))
        names = content.get("names")
        if not names or not any(content.get(split) for split in ("train", "val", "test")):
            continue
        found = Found(Path(file), "yolo")
        for split in ("train", "val", "test"):
            if content.get(split) and content.get(split) != content.get("train" if split != "train" else ""):
                found.parts.append(Part(split, "yolo", {"data": Path(file), "split": split}))
        missing = [part.split for part in found.parts if not _is_there(Path(file), content, part.split)]
        if any(part.split == "train" for part in found.parts) and "train" not in missing:
            for split in missing:
                found.remarks.append(
                    f"{relative(file)}: its `{split}` is not there: {printable(str(content[split]))[:80]}"
                )
            found.parts = [part for part in found.parts if part.split not in missing]
            return found
        named = list(names.values()) if isinstance(names, dict) else list(names)
        if all(isinstance(name, str) for name in named):
            other = _yolo_folders(tree if tree.texts else _list(tree.top), named)
            if other is not None:
                where = printable(str(content.get("train")))[:80]
                other.remarks.append(
                    f"{relative(file)}: its `train` is not there ({where}); the names are taken from it"
                )
            return other
    return None


def _small_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_regular(path, 2**20))
    except Exception:  # another tool's file; PyYAML raises all sorts of errors
        return {}
    return content if isinstance(content, dict) else {}


def _is_there(file: Path, content: dict[str, Any], split: str) -> bool:
    value = content.get(split)
    entries = value if isinstance(value, list) else [value]
    root = file.parent / str(content.get("path") or "")
    return all(
        isinstance(one, str) and ((root / one).exists() or (root / one.removeprefix("../")).exists()) for one in entries
    )


def _yolo_folders(tree: _Tree, names: list[str] | None = None) -> Found | None:
    """Label files beside images, or in `labels/` where those are in `images/`."""
    labels = {text for text in tree.texts if os.path.basename(text).lower() not in _OTHER_TEXTS}  # noqa: PTH119
    sample = sorted(labels)[:: max(1, len(labels) // _SAMPLED)]
    looks = [text for text in sample if _is_label(Path(text))]
    if not looks or len(looks) < len(sample) / 2:
        return None
    by_folder: dict[str, list[str]] = {}
    for image in tree.images:
        if label_file(image) in labels:
            by_folder.setdefault(os.path.dirname(image), []).append(image)  # noqa: PTH120
    if not by_folder:
        raise DataError(
            f"{relative(tree.top)}: there are label files of YOLO's form, such as {relative(looks[0])}, but none that "
            "belongs to an image: the labels of images/a.jpg are labels/a.txt, and those of any other folder lie "
            "beside the images; rename the folders like that"
        )
    if names is None:
        names = _listed_names(tree) or _numbered(sorted(labels))
    found = Found(tree.top, "yolo", names=names)
    splits: dict[str, list[str]] = {}
    for folder in sorted(by_folder):
        splits.setdefault(split_in(os.path.relpath(folder, tree.top)), []).append(folder)
    if "train" not in splits:
        splits = {"": [folder for folders in splits.values() for folder in folders]}
    for split, folders in splits.items():
        found.parts.append(Part(split or "train", "yolo", {"folders": folders}))
    return found


def _is_label(path: Path) -> bool:
    """Whether a text's lines are those of labels; an empty one may be."""
    try:
        with open_regular(path) as file:
            lines = [line for line in file.read(4096).split(b"\n")[:3] if line.strip()]
    except OSError:
        return False
    return all(_LABEL.fullmatch(line) for line in lines[:2])


def _listed_names(tree: _Tree) -> list[str] | None:
    """The names in a classes.txt, as tools write it among the labels."""
    for text in tree.texts:
        if os.path.basename(text).lower() in ("classes.txt", "obj.names", "labels.txt"):  # noqa: PTH119
            lines = [line.strip() for line in read_regular(Path(text), 2**20).decode("utf-8", "replace").splitlines()]
            if lines and not any(_LABEL.fullmatch(line.encode()) for line in lines):
                return [line for line in lines if line]
    return None


def _numbered(labels: Sequence[str]) -> list[str]:
    """Names for classes that are known by their numbers alone."""
    most = 0
    for label in labels:
        try:
            lines = read_regular(Path(label), 2**24).split(b"\n")
        except OSError:
            continue
        most = max([most, *(int(words[0]) for line in lines if (words := line.split()) and words[0].isdigit())])
        if most > 10_000:
            raise DataError(f"{relative(label)}: class {most}; expected class numbers from 0, as YOLO's form has")
    return [f"class {number}" for number in range(most + 1)]


# COCO


def json_kind(path: Path) -> str:
    """coco (LVIS is such a file too), labelme, or nothing."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > _SMALL_JSON:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                    has = {
                        key
                        for key in ("images", "annotations", "categories", "shapes")
                        if view.find(f'"{key}"'.encode()) >= 0
                    }
                if {"images", "categories"} <= has:
                    return "coco"
                return "labelme" if "shapes" in has else ""
        content = read_json(path, _SMALL_JSON)
    except (OSError, DataError):
        return "coco" if _mentions(path, b'"images"', b'"categories"') else ""
    if is_labelme(content):
        return "labelme"
    return "coco" if isinstance(content, dict) and {"images", "categories"} <= set(content) else ""


def _mentions(path: Path, *keys: bytes) -> bool:
    """Whether a file that cannot be read as JSON has these words: its reader then says what is wrong."""
    try:
        content = read_regular(path, _SMALL_JSON)
    except OSError:
        return False
    return all(key in content for key in keys)


def _coco(tree: _Tree) -> Found | None:
    # of thousands of JSON files, one for each image say, a few tell what they are
    few = sorted(tree.json, key=lambda name: (name.count(os.sep), name))[:_SAMPLED]
    files = [Path(file) for file in few if json_kind(Path(file)) == "coco"]
    if not files:
        return None
    found = Found(files[0] if len(files) == 1 else tree.top, "coco")
    chosen: dict[str, list[_File]] = {}
    folders = _image_folders(tree)
    for file in files:
        names, labelled = _file_names(file)
        if not labelled:
            found.remarks.append(f"{relative(file)}: no objects with boxes in it, not used")
            continue
        folder = _folder_of(file, names, folders)
        if folder is None:
            raise DataError(
                f"{relative(file)}: its images, such as '{printable(names[0]) if names else '?'}', are not below "
                f"{relative(tree.top)}; give a folder that has both the images and the annotations"
            )
        split = split_in(file.stem) or split_in(os.path.relpath(file.parent, tree.top)) or split_in(folder.name)
        chosen.setdefault(split, []).append(_File(file, folder, set(names)))
    if not chosen:
        raise DataError(
            f"{relative(tree.top)}: no object has a box in {', '.join(relative(file) for file in files[:3])}"
        )
    for split, several in chosen.items():
        for one in _of_one_kind(several, found.remarks):
            found.parts.append(Part(split, "coco", {"annotation_file": one.path, "image_folder": one.folder}))
    return found


class _File(NamedTuple):
    """A JSON file of COCO's form."""

    path: Path
    folder: Path
    """In which its images are."""
    names: set[str]


def _of_one_kind(files: list[_File], remarks: list[str]) -> list[_File]:
    """Of several files about the same images (boxes, keypoints, run lengths), the plain one."""
    kept: list[_File] = []
    for file in sorted(files, key=lambda one: ("instances" not in one.path.name, len(one.path.name), one.path.name)):
        other = next((one for one in kept if one.names & file.names), None)
        if other is None:
            kept.append(file)
        else:
            remarks.append(f"{relative(file.path)}: about images that {relative(other.path)} has too, not used")
    return kept


def _file_names(file: Path) -> tuple[list[str], bool]:
    """The images' names that a file of COCO's form lists, and whether it has objects with boxes."""
    content = read_json(file, 2**34)
    images = content.get("images") if isinstance(content, dict) else None
    entries = [one for one in images or () if isinstance(one, dict)] if isinstance(images, list) else []
    names = [name for one in entries if isinstance(name := file_name_of(one), str)]
    objects = content.get("annotations")
    some = objects[0] if isinstance(objects, list) and objects and isinstance(objects[0], dict) else {}
    return names, bool(some.get("bbox") or some.get("segmentation"))


def file_name_of(image: dict[str, Any]) -> Any:
    """`file_name`; LVIS has the address instead, of which the last two parts are folder and file."""
    name = image.get("file_name")
    if name is None and isinstance(address := image.get("coco_url"), str):
        return "/".join(address.split("/")[-2:])
    return name


def _image_folders(tree: _Tree) -> list[Path]:
    """Folders that `file_name` may start from: those of images, and those above them within the tree."""
    for top in (tree.top, tree.top.parent):
        images = tree.images if top == tree.top and tree.images else _list(top).images
        if images:
            folders = {Path(image).parent for image in images}
            above = {
                parent for folder in folders for parent in folder.parents if parent == top or top in parent.parents
            }
            return sorted(folders | above)
    return []


def _folder_of(file: Path, names: Sequence[str], folders: Iterable[Path]) -> Path | None:
    """The folder in which most of the named images are; of several, that with the split's name, then the nearest."""
    sample = names[:: max(1, len(names) // 50)]
    split = split_in(file.stem)

    def rank(folder: Path) -> tuple[int, bool, int]:
        there = sum(os.path.isfile(os.path.join(folder, name)) for name in sample)  # noqa: PTH113, PTH118
        shared = len(os.path.commonpath([os.path.abspath(folder), os.path.abspath(file)]))  # noqa: PTH100
        return there, bool(split) and split_in(folder.name) == split, shared

    best = max(folders, key=rank, default=None)
    return best if best is not None and rank(best)[0] else None


# Pascal VOC


def _voc(tree: _Tree) -> Found | None:
    by_folder = Counter(os.path.dirname(file) for file in tree.xml)  # noqa: PTH120
    first = {folder: next(file for file in tree.xml if os.path.dirname(file) == folder) for folder in by_folder}  # noqa: PTH120
    folders = [folder for folder in sorted(by_folder) if _is_voc(Path(first[folder]))]
    if not folders:
        return None
    images: dict[str, set[str]] = {}
    for image in tree.images:
        images.setdefault(os.path.dirname(image), set()).add(fold(image))  # noqa: PTH120
    found = Found(tree.top, "voc")
    for folder in folders:
        stems = {fold(file) for file in tree.xml if os.path.dirname(file) == folder}  # noqa: PTH120
        own = max(images, key=lambda one: (len(images[one] & stems), one == folder), default="")
        if not own or not images[own] & stems:
            found.remarks.append(
                f"{relative(folder)}: {counted(len(stems), 'XML file')} whose images are nowhere, not used"
            )
            continue
        found.parts += _voc_parts(Path(folder), Path(own), tree.top)
    if not found.parts:
        raise DataError("; ".join(found.remarks))
    return found


def _is_voc(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return b"<annotation" in file.read(4096)
    except OSError:
        return False


def _voc_parts(annotations: Path, images: Path, top: Path) -> list[Part]:
    root = Path(os.path.commonpath([annotations, images]))
    options: dict[str, Any] = {"root": root}
    for name, folder, default in (
        ("image_folder", images, "JPEGImages"),
        ("annotation_folder", annotations, "Annotations"),
    ):
        below = os.path.relpath(folder, root)
        if below != default:
            options[name] = below
    for lists in ("ImageSets/Main", "ImageSets", "ImageSets/Layout"):
        there = {file.stem for file in (root / lists).glob("*.txt")} if (root / lists).is_dir() else set()
        chosen: list[str] = [name for name in ("train", "val", "test") if name in there]
        if "trainval" in there and "train" not in there:
            chosen = ["trainval", *(name for name in chosen if name == "test")]
        if chosen:
            if lists != "ImageSets/Main":
                options["split_folder"] = lists
            return [Part("train" if name == "trainval" else name, "voc", {**options, "split": name}) for name in chosen]
    return [Part(split_in(os.path.relpath(annotations, top)), "voc", {**options, "split": None})]


# LabelMe


def _labelme(tree: _Tree) -> Found | None:
    few = tree.json[:: max(1, len(tree.json) // 20)][:20]
    if not any(json_kind(Path(file)) == "labelme" for file in few):
        return None
    found = Found(tree.top, "labelme")
    splits: dict[str, set[Path]] = {}
    for file in tree.json:
        steps = Path(os.path.relpath(file, tree.top)).parts
        split = split_in(steps[0]) if len(steps) > 1 else ""
        splits.setdefault(split, set()).add(tree.top / steps[0] if split else tree.top)
    if "train" not in splits or "" in splits:
        splits = {"": {tree.top}}
    for split, roots in splits.items():
        found.parts += [Part(split, "labelme", {"root": root}) for root in sorted(roots)]
    return found
