"""A detector as one graph of tensors: what `torch.export` and ONNX are given, and how NMS is said there."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from detkernel import UserError
from detkernel_detection import nms as _nms  # noqa: F401 - registers the operator
from detkernel_detection.predictions import Predictions
from torch import Tensor, nn

if TYPE_CHECKING:
    from detkernel_detection.detector import Detector
    from torch.export import ExportedProgram

INPUTS = ("images", "sizes")
OUTPUTS = ("boxes", "scores", "labels", "valid", "masks", "keypoints")
OPSET = 20
INSTEAD = "native detectors can be, such as fcos, retinanet, faster_rcnn, mask_rcnn"


class Graph(nn.Module):
    """Images (uint8 [B, 3, H, W]) and their sizes without padding (int64 [B, 2]) to the arrays of `Predictions`."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        found: Any = self.model(images, None, sizes)
        return tuple(value for value in found[: len(OUTPUTS)] if value is not None)


def outputs_of(found: Predictions) -> list[str]:
    """The names of what a model predicts, in the order of a graph's outputs."""
    return [name for name, value in zip(OUTPUTS, found, strict=False) if value is not None]


def program(graph: Graph, size: tuple[int, int], dynamic: int | None = None) -> ExportedProgram:
    """The graph for batches of any number of images of a size; `dynamic`: of any multiple of this number of pixels,
    within `limits`.

    Raises `UserError` where the model is no such graph.
    """
    batch = torch.export.Dim("batch", min=1, max=1024)
    image: dict[int, Any] = {0: batch}
    if dynamic is not None:
        # torch takes a side of 1 for one that is always 1: the coarsest map is to be larger, and no two sides alike
        size = 16 * dynamic, 20 * dynamic
        most = max(32, 4096 // dynamic)
        image |= {2: dynamic * torch.export.Dim("rows", min=1, max=most)}
        image |= {3: dynamic * torch.export.Dim("columns", min=1, max=most)}
    images = torch.zeros((2, 3, *size), dtype=torch.uint8)
    sizes = torch.tensor([size, size])
    try:
        with torch.no_grad(), _without_log("torch._guards"):  # of what it raises, it logs a page before
            return torch.export.export(
                graph, (images, sizes), dynamic_shapes={"images": image, "sizes": {0: batch}}, strict=True
            )
    except Exception as error:  # torch has no type for what it cannot trace
        raise UserError(
            f"{type(graph.model).__name__} cannot be exported{' for images of any size' * (dynamic is not None)}: "
            f"torch cannot make one graph of it ({_said(error)}); "
            f"{INSTEAD if dynamic is None else 'leave out --dynamic-size'}"
        ) from error


def limits(exported: ExportedProgram, dynamic: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest and the largest (height, width) that a graph of any size is right for: torch finds what its steps
    need, such as a coarsest map of more than one row."""
    images = next(node for node in exported.graph.nodes if node.name == "images")
    found = []
    for side in images.meta["val"].shape[2:]:
        [symbol] = side.node.expr.free_symbols
        bounds = exported.range_constraints[symbol]
        found.append((int(bounds.lower) * dynamic, int(bounds.upper) * dynamic))
    (least_rows, most_rows), (least_columns, most_columns) = found
    return (least_rows, least_columns), (most_rows, most_columns)


@contextmanager
def _without_log(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _said(error: Exception) -> str:
    """The line of an error that says what is wrong: the first, or that of the cause which torch sums up at the end."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = next((lines[place + 1 :] for place, line in enumerate(lines) if line == "## Exception summary"), lines)
    return next(iter(after), type(error).__name__)[:200]


def onnx_file(exported: ExportedProgram, path: str, outputs: Sequence[str], metadata: dict[str, str]) -> None:
    """Write an ONNX file with all weights in it. Raises `UserError` where ONNX has no words for an operation."""
    import onnx

    model = _onnx_model(exported, outputs, simplify=True)
    if _undefined(model):  # onnxscript 0.7 joins clamps of a tensor to nodes whose limits it names alike and loses
        model = _onnx_model(exported, outputs, simplify=False)
    for name, value in metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value
    onnx.save_model(model, path)


def _onnx_model(exported: ExportedProgram, outputs: Sequence[str], simplify: bool) -> Any:
    torch_onnx: Any = torch.onnx
    try:
        made = torch_onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(outputs),
            custom_translation_table={torch.ops.detkernel.nms.default: _suppression},
            optimize=simplify,
            verbose=False,
        )
    except Exception as error:  # torch's type for it is not public
        raise UserError(f"cannot be written as ONNX: torch has no translation ({_said(error)})") from error
    return made.model_proto


def _undefined(model: Any) -> set[str]:
    """Names that nodes of the graph read and nothing gives."""
    graph = model.graph
    given = {one.name for one in (*graph.input, *graph.initializer)}
    given |= {name for node in graph.node for name in node.output}
    return {name for node in graph.node for name in node.input if name} - given


def _suppression(boxes: Any, scores: Any, iou: float) -> Any:
    """`detkernel::nms` in ONNX's words: bool [B, K], from (image, class, box) of each that NonMaxSuppression keeps."""
    import onnxscript

    op: Any = onnxscript.opset20
    most = op.Shape(scores, start=1, end=2)
    one_class = op.Unsqueeze(scores, op.Constant(value_ints=[1]))
    kept = op.NonMaxSuppression(boxes, one_class, most, op.Constant(value_floats=[iou]))
    places = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Add(op.ConstantOfShape(op.Shape(places, start=0, end=1)), op.Constant(value_float=1.0))
    return op.Cast(op.ScatterND(op.ConstantOfShape(op.Shape(scores)), places, ones), to=9)
