"""An exported file behind the interface of a detector."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detkernel import CheckpointError, DataError, UserError
from detkernel.errors import did_you_mean, printable, relative
from detkernel_detection.detector import Detector
from detkernel_detection.predictions import Predictions
from detkernel_detection.structures import Targets
from torch import Tensor
from torch.nn import functional

from detkernel_export.graph import INPUTS, OUTPUTS


def open_session(path: Path, *, light: bool = False, device: str = "cpu") -> Any:
    """ONNX Runtime's session of a file; `light`: only to read what the file says. Raises `UserError`."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f"{relative(path)}: ONNX files are run by ONNX Runtime: pip install 'detkernel-export[onnx]'"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    if light:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
    providers = [name for name in (*wanted, "CPUExecutionProvider") if name in onnxruntime.get_available_providers()]
    if not Path(path).is_file():
        raise CheckpointError(f"{relative(path)}: there is no such file")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # it has no types for what a broken file makes of it
        said = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{relative(path)}: not an ONNX file that can be run ({printable(said[:200])})") from None


class FileDetector(Detector):
    """What a file finds, with the labels of the run's classes."""

    labels: Tensor

    def __init__(self, path: Path, held: Mapping[str, Any], classes: Sequence[str]) -> None:
        super().__init__(classes)
        missing = [name for name in classes if name not in held["classes"]]
        if missing:
            raise DataError(
                f"{relative(path)}: it does not know the class '{printable(missing[0])}' of the data"
                f"{did_you_mean(missing[0], held['classes'])}"
            )
        self.outputs = [name for name in held["outputs"] if name in OUTPUTS]
        self.size: tuple[int, int] = tuple(held["size"])
        self.multiple: int | None = held.get("multiple")
        self.smallest: Sequence[int] = held.get("smallest", (1, 1))
        self.largest: Sequence[int] = self.size if self.multiple is None else held.get("largest", (4096, 4096))
        self.path = path
        places = [classes.index(name) if name in classes else -1 for name in held["classes"]]
        self.register_buffer("labels", torch.tensor(places), persistent=False)
        self.keypoint_names = tuple(held.get("keypoints", ()))
        self.max_detections = held.get("max_detections")
        for name in ("mask_space", "mask_paste", "mask_threshold"):
            if name in held:
                setattr(self, name, held[name])

    @abstractmethod
    def found(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """The outputs by name, on any device. images: uint8 [B, 3, H, W], padded; sizes [B, 2] without the padding."""

    def forward(
        self,
        images: Tensor,
        targets: Targets | None = None,
        sizes: Tensor | None = None,
        after_forward: Callable[[Any], Mapping[str, Tensor]] | None = None,
    ) -> dict[str, Tensor] | Predictions:
        if targets is not None:
            raise UserError(f"{relative(self.path)}: an exported file cannot be trained")
        height, width = images.shape[-2:]
        if images.is_floating_point():
            raise DataError(
                f"{relative(self.path)}: takes uint8 images, and normalises them itself; remove the transform that does"
            )
        if sizes is None:
            sizes = torch.tensor([[height, width]] * len(images))
        padded = functional.pad(images, (0, self._room(width, 1), 0, self._room(height, 0)))
        arrays = {name: value.to(images.device) for name, value in self.found(padded, sizes).items()}
        return self._relabelled(Predictions(**arrays))  # type: ignore[arg-type]

    def _room(self, side: int, axis: int) -> int:
        """Pixels of padding that the file wants."""
        if side > self.largest[axis]:
            height, width = self.largest
            what = "export it with a larger --size" if self.multiple is None else "make them smaller"
            raise DataError(
                f"{relative(self.path)}: takes images of up to {width}x{height}, got one with a side of {side}; {what}"
            )
        if self.multiple is None:
            return self.size[axis] - side
        return max(side + -side % self.multiple, self.smallest[axis]) - side

    def _relabelled(self, found: Predictions) -> Predictions:
        """With the run's labels; classes that the run does not have go, and what is left stands first."""
        labels = self.labels[found.labels]
        valid = found.valid & (labels >= 0)
        if torch.equal(valid, found.valid):
            return found._replace(labels=labels.clamp(min=0))
        order = (~valid).int().argsort(dim=1, stable=True)

        def sorted_by(values: Tensor | None) -> Any:
            if values is None:
                return None
            places = order.reshape(*order.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
            return values.gather(1, places)

        parts = {name: sorted_by(getattr(found, name)) for name in OUTPUTS}
        return Predictions(**{**parts, "labels": sorted_by(labels).clamp(min=0), "valid": sorted_by(valid)})


class OnnxDetector(FileDetector):
    """What ONNX Runtime finds with the file."""

    def __init__(self, path: Path, held: Mapping[str, Any], classes: Sequence[str], device: str) -> None:
        super().__init__(path, held, classes)
        self.session = open_session(path, device=device)

    def found(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        given = dict(zip(INPUTS, (images.cpu().contiguous().numpy(), sizes.cpu().numpy()), strict=True))
        values = self.session.run(self.outputs, given)
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}
