"""Weights from a file: `load_from`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detkernel import CheckpointError
from detkernel.testing import TinyData, TinyDataset, tiny_kernel, tiny_run
from detkernel_checkpoint.checkpoint import Checkpoint
from detkernel_checkpoint.embedded import config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    tiny_run({"checkpoint": Checkpoint()}, work_dir=folder)
    return folder / "checkpoints" / "iter_4.pt"


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def loaded(path: Path, tmp_path: Path, allow: bool = False) -> dict[str, torch.Tensor]:
    """The model's weights right after loading."""
    found = {}

    from detkernel import Run, hookimpl, plugin

    @plugin
    class Look:
        """Looks at the model."""

        @hookimpl
        def before_run(self, run: Run) -> None:
            found.update({name: tensor.clone() for name, tensor in run.model.state_dict().items()})
            assert run.iter == 0

    checkpoint = Checkpoint(load_from=path, allow_mismatch=allow)
    tiny_run({"checkpoint": checkpoint, "look": Look()}, until="1 iter", seed=5, work_dir=tmp_path / "run")
    return found


@pytest.mark.parametrize("form", ["checkpoint", "plain", "state_dict", "wrapped"])
def test_weights_are_loaded_without_the_position(trained: Path, tmp_path: Path, form: str):
    wanted = weights(trained)
    contents = {
        "plain": wanted,
        "state_dict": {"state_dict": wanted, "meta": {"epoch": 3}},
        "wrapped": {f"module.{name}": tensor for name, tensor in wanted.items()},
    }
    path = trained
    if form != "checkpoint":
        path = tmp_path / "weights.pth"
        torch.save(contents[form], path)
    found = loaded(path, tmp_path)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_does_not_fit_is_listed(trained: Path, tmp_path: Path):
    changed = weights(trained)
    changed["3.weight"] = torch.zeros(9, 128)
    changed["extra"] = torch.zeros(1)
    del changed["3.bias"]
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as caught:
        loaded(tmp_path / "other.pth", tmp_path)
    text = str(caught.value)
    assert "other.pth: 7 of the model's 9 tensors fit; to load those that fit, set allow_mismatch: true" in text
    assert "  1 of another shape: 3.weight [9, 128], expected [7, 128]" in text
    assert "  1 missing: 3.bias" in text
    assert "  1 unexpected: extra" in text


def test_what_fits_is_loaded_when_told(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    changed = {**weights(trained), "3.weight": torch.zeros(9, 128)}
    torch.save(changed, tmp_path / "other.pth")
    with caplog.at_level("INFO", "detkernel"):
        found = loaded(tmp_path / "other.pth", tmp_path, allow=True)
    assert torch.equal(found["0.0.weight"], changed["0.0.weight"])
    assert "loaded 8 of 9 tensors from" in caplog.text
    assert "1 of another shape: 3.weight" in caplog.text


def test_weights_of_which_none_fits_are_refused_always(tmp_path: Path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="0 of the model's 9 tensors fit; none fits"):
        loaded(tmp_path / "a.pth", tmp_path, allow=True)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": 1}}, {}])
def test_a_file_without_weights_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: no weights: expected a dict of tensors"):
        loaded(tmp_path / "a.pth", tmp_path)


def test_a_run_that_is_resumed_does_not_load_them_again(trained: Path, tmp_path: Path):
    for _ in range(2):
        run = tiny_run({"checkpoint": Checkpoint(load_from=trained)}, until="8 iters", work_dir=tmp_path)
    trained.rename(trained.with_name("moved.pt"))
    try:
        run = tiny_run({"checkpoint": Checkpoint(load_from=trained)}, until="8 iters", work_dir=tmp_path)
    finally:
        trained.with_name("moved.pt").rename(trained)
    assert run.iter == 8


@pytest.mark.parametrize("mode", ["load_from", "test"])
def test_weights_of_classes_in_another_order_are_refused(trained: Path, tmp_path: Path, mode: str):
    class Reordered(TinyDataset):
        def load(self) -> None:
            super().load()
            self.classes = ("green", "red", "blue")

    data = TinyData(dataset=Reordered())
    message = r"is of the same classes in another order: red, green, blue; the data has green, red, blue"

    def start() -> None:
        if mode == "test":
            tiny_kernel({"checkpoint": Checkpoint(), "data": data}, work_dir=trained.parents[1]).test()
        else:
            tiny_run({"checkpoint": Checkpoint(load_from=trained), "data": data}, work_dir=tmp_path)

    with pytest.raises(CheckpointError, match=message):
        start()


def test_the_config_in_a_checkpoint_names_it_as_where_to_go_on(trained: Path, tmp_path: Path):
    kernel = tiny_kernel({"checkpoint": Checkpoint(load_from=trained)}, until="1 iter", work_dir=tmp_path)
    kernel.state.config = {"run": {"until": "1 iters"}, "keep": {"use": "checkpoint", "load_from": str(trained)}}
    kernel.run()
    path = tmp_path / "checkpoints/iter_1.pt"
    assert config(path)["keep"] == {"use": "checkpoint", "load_from": None, "resume": str(path)}
    kernel = tiny_kernel({"checkpoint": Checkpoint()}, until="1 iter", work_dir=tmp_path / "other")
    kernel.state.config = {"run": {"until": "1 iters"}}
    kernel.run()
    with pytest.raises(CheckpointError, match=r"iter_1.pt: holds no config with the checkpoint plugin; give a YAML"):
        config(tmp_path / "other/checkpoints/iter_1.pt")
    (tmp_path / "torn.pt").write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"torn.pt: torn"):
        config(tmp_path / "torn.pt")
