"""The `exported` plugin: a model that is a file of `detkernel export`, to test and to predict with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkernel import CheckpointError, Run, UserError, hookimpl, option, plugin
from detkernel.errors import relative
from detkernel_detection.model_plugin import DetectorPlugin
from detkernel_detection.predictor import SCORE_THRESHOLD

if TYPE_CHECKING:
    from detkernel_detection.detector import Detector

KEY = "detkernel"
"""Of what a file says of itself: JSON."""
FORMAT = 1


@plugin(key="model")
class Exported(DetectorPlugin):
    """A detector in a file of `detkernel export`, run by ONNX Runtime or torch. It cannot be trained."""

    file: Path = option(help="an ONNX file of `detkernel export`, or a torch.export file that it wrote here")

    @property
    def loads_weights(self) -> bool:
        return True

    @hookimpl
    def setup(self, run: Run) -> None:
        if run.mode == "train":
            raise UserError(
                f"{relative(self.file)}: an exported file cannot be trained, only tested and predicted with"
            )
        if run.mode == "predict":
            held = metadata(self.file)
            run.known_classes = tuple(held["classes"])
            if isinstance(held.get("best_score"), float):
                run.metrics[SCORE_THRESHOLD] = held["best_score"]

    def build(self, run: Run) -> Detector:
        if _is_torch_export(self.file):
            from detkernel_export.torch_file import TorchExportDetector

            return TorchExportDetector(self.file, metadata(self.file), run.classes)
        from detkernel_export.session import OnnxDetector

        return OnnxDetector(self.file, metadata(self.file), run.classes, str(run.device))


def config(path: Path) -> dict[str, Any]:
    """The config that a file was exported with, with the file as its model. Raises `CheckpointError`."""
    held = metadata(path)
    found: Any = held["config"]
    return {**found, held["model"]: {"use": "exported", "file": str(path)}}


def metadata(path: Path) -> dict[str, Any]:
    """What the file says of itself. Raises `CheckpointError` for one that `detkernel export` did not write."""
    if _is_torch_export(path):
        from detkernel_export.torch_file import text_in

        text = text_in(path)
    else:
        from detkernel_export.session import open_session

        text = open_session(path, light=True).get_modelmeta().custom_metadata_map.get(KEY)
    try:
        held = json.loads(text) if text is not None else None
    except ValueError:
        held = None
    form = {"format": int, "classes": list, "model": str, "config": dict, "size": list, "outputs": list}
    if not isinstance(held, dict) or not all(isinstance(held.get(name), kind) for name, kind in form.items()):
        raise CheckpointError(f"{relative(path)}: not a file of `detkernel export`: it says nothing of its classes")
    if held["format"] != FORMAT:
        raise CheckpointError(f"{relative(path)}: has format {held['format']}, this detkernel reads {FORMAT}")
    names = held["classes"]
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{relative(path)}: its classes are not names")
    return held


def _is_torch_export(path: Path) -> bool:
    return path.suffix == ".pt2"
