"""Every family as an ONNX file: it finds what the detector finds that has learned eight images by heart. Some minutes,
so in `tox -e torture`; `test_export_command.py` has one by default."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .conftest import long

pytestmark = long
OVERFIT = Path(__file__).parents[1] / "plugins/detectors/tests/test_detectors_overfit.py"


def overfit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("overfit", OVERFIT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["fcos", *overfit().MORE])
def test_its_onnx_file_finds_what_it_finds(name: str, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from detkernel_export.export import write
    from detkernel_export.exported import metadata

    run = overfit().learned(name, tmp_path)
    network = run.bare_model.eval()
    model: Any = SimpleNamespace(
        name=f"{name}.pt",
        module=network,
        transforms=[],
        classes=run.classes,
        keypoint_names=(),
        data=SimpleNamespace(val=run.loaders["train"].dataset),
        config=SimpleNamespace(plain={"run": {}, "model": {"use": name}}),
        answering=lambda event: ["model"] if event == "build_model" else [],
        best_score=None,
    )
    any_size = name in ("fcos", "retinanet")
    wrote, told, _ = write(model, tmp_path / f"{name}.onnx", "onnx", size="64x64", dynamic=any_size, tolerance=1e-4)
    assert any_size == ("any size from 64x64 to 4096x4096" in wrote)
    print(f"\n{name}, {run.iter} iterations: {told}")
    count = int(told.removeprefix("checked with ONNX Runtime: ").split(" ", 1)[0])
    assert count >= 8, "two objects in each of four images"
    assert metadata(tmp_path / f"{name}.onnx")["classes"] == list(run.classes)
