"""One process: where it runs, its seeds, its random numbers, and what it sets back."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detkernel import ConfigError, Run, UserError, hookimpl, plugin, state
from detkernel_detection import Batch
from detkernel_detection.testing import TinyDataset, TinyDetector, TinyLoader, tiny_kernel, tiny_run
from detkernel_runtime import settings as settings_of_process
from detkernel_runtime.device import Device
from detkernel_runtime.parallel import ddp


@plugin
class Probe:
    """Writes down what other plugins see."""

    seen: list = state(factory=list)
    _random: list = state(factory=list)

    @hookimpl
    def setup(self):
        self._random += [random.random(), float(np.random.rand()), float(torch.rand(()))]

    @hookimpl
    def before_train_iter(self, run, batch):
        self.seen.append(("train", run.model.training, torch.is_grad_enabled()))

    @hookimpl
    def before_val_iter(self, run, batch):
        self.seen.append(("val", run.model.training, torch.is_grad_enabled()))


def test_the_model_is_in_the_right_mode_around_a_validation(tmp_path: Path):
    probe = Probe()
    run = tiny_run(
        {"device": Device(device="cpu"), "probe": probe}, until="2 iters", validate="1 iter", work_dir=tmp_path
    )
    modes = [
        seen
        for seen, before in zip(probe.seen, [None, *probe.seen], strict=False)
        if before is None or seen[0] != before[0]
    ]
    assert modes == [("train", True, True), ("val", False, True)] * 2
    assert run.model.training
    assert run.device == torch.device("cpu")


def test_a_test_leaves_the_model_in_eval_mode(tmp_path: Path):
    kernel = tiny_kernel({"device": Device(), "probe": (probe := Probe())}, work_dir=tmp_path)
    run = kernel.test()
    assert probe.seen[0] == ("val", False, True)
    assert run.mode == "test"


@plugin(priority="high")
class Gradless:
    """Looks at the gradient mode inside a step."""

    enabled: list = state(factory=list)

    @hookimpl
    def train_step(self):
        self.enabled.append(torch.is_grad_enabled())

    @hookimpl
    def val_step(self):
        self.enabled.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))


def test_validation_steps_run_without_gradients_and_without_inference_mode(tmp_path: Path):
    gradless = Gradless()
    tiny_run({"device": Device(), "g": gradless}, until="1 iter", validate="1 iter", work_dir=tmp_path)
    assert set(gradless.enabled) == {True, (False, False)}


@plugin
class OwnTrain:
    """A model that keeps its norm layers in eval mode, as detectors with frozen norms do."""

    @hookimpl
    def prepare_model(self, run):
        norm = run.model[0][1]
        norm.train = lambda mode=True: type(norm).train(norm, False)


def test_a_model_that_keeps_its_norms_frozen_is_left_in_peace(tmp_path: Path):
    run = tiny_run({"device": Device(), "own": OwnTrain()}, until="2 iters", validate="1 iter", work_dir=tmp_path)
    assert run.model.training
    assert not run.model[0][1].training
    assert run.model[0][1].num_batches_tracked == 0


def test_every_generator_follows_from_the_seed(tmp_path: Path):
    drawn = []
    for seed in (3, 3, 4):
        probe = Probe()
        tiny_run({"device": Device(), "probe": probe}, until="1 iter", seed=seed, work_dir=tmp_path)
        drawn.append(probe._random)
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))


def test_a_seed_beyond_32_bits_is_taken(tmp_path: Path):
    tiny_run({"device": Device()}, until="1 iter", seed=2**63 - 1, work_dir=tmp_path)


def draw() -> list[float]:
    numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]
    return [*numbers, *torch.rand(3).tolist(), float(torch.randn(()))]


def test_random_numbers_go_on_from_a_saved_state(tmp_path: Path):
    device = Device()
    random.gauss(0, 1), np.random.randn()  # both now hold a second normal number back
    torch.save(device.state_dict(), tmp_path / "state.pt")
    expected = draw()
    draw()
    device.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_what_is_global_is_set_back_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []

    @plugin
    class Look:
        """Reads the settings."""

        @hookimpl
        def before_run(self):
            seen.append(settings())

    before = settings()
    tiny_run({"device": Device(deterministic=True, threads=2), "look": Look()}, until="1 iter", work_dir=tmp_path)
    assert seen == [(True, True, False, 2)]
    assert settings() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_memory_that_a_step_frees_is_there_for_the_next(tmp_path: Path):
    """Not given back to the system in between, from where it comes page by page: 16,384 for these 64 MB."""
    pages = []

    @plugin
    class Allocate:
        """Takes and frees what a model with 16 million parameters has of gradients."""

        @hookimpl
        def before_train_iter(self):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2**24)
            pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    tiny_run({"device": Device(device="cpu"), "allocate": Allocate()}, until="4 iters", work_dir=tmp_path)
    assert pages[-1] < 1000


def settings() -> tuple[bool, bool, bool, int]:
    fill = torch.utils.deterministic.fill_uninitialized_memory
    threads = torch.get_num_threads()
    return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic, fill, threads


def test_a_workspace_that_is_not_reproducible_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, it is ':0:0'"):
        tiny_run({"device": Device(deterministic=True)}, work_dir=tmp_path)


def test_a_device_that_is_none_is_refused():
    with pytest.raises(ValueError, match="device: expected 'auto', 'cpu', 'cuda' or such as 'cuda:1', got 'gpu'"):
        Device(device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"device: got 'cuda:1', but .*; use 'cpu'"):
        tiny_run({"device": Device(device="cuda:1")}, work_dir=tmp_path)


def test_half_an_environment_of_torchrun_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Exception, match="LOCAL_RANK and WORLD_SIZE is not a number: start several processes with"):
        tiny_run({"device": Device()}, work_dir=tmp_path)


def test_check_says_where_it_would_run(tmp_path: Path):
    summary = tiny_kernel({"device": Device(device="cpu", threads=1)}, work_dir=tmp_path).check()
    assert summary["device"] == "cpu, 1 thread"
    assert int(summary["memory"].split()[0].replace(",", "")) > 100


def test_memory_is_a_scalar_in_megabytes(tmp_path: Path):
    run = tiny_run({"device": Device(device="cpu")}, until="1 iter", work_dir=tmp_path)
    assert 100 < run.scalars["memory"]() < 100_000


def test_weights_are_channels_last_unless_told(tmp_path: Path):
    for wanted in (True, False):
        run = tiny_run({"device": Device(channels_last=wanted)}, until="1 iter", work_dir=tmp_path)
        assert run.model[0][0].weight.is_contiguous(memory_format=torch.channels_last) is wanted


@pytest.mark.parametrize("event", ["train_step", "after_train_iter"])
def test_memory_that_runs_out_names_the_images(event: str, tmp_path: Path):
    def allocate() -> None:
        torch.empty(2**50, dtype=torch.uint8)

    @plugin
    class Forward:
        """Wants a petabyte in forward."""

        @hookimpl
        def train_step(self) -> None:
            allocate()

    @plugin
    class Backward:
        """Wants a petabyte in backward."""

        @hookimpl
        def after_train_iter(self) -> None:
            allocate()

    hungry = Forward() if event == "train_step" else Backward()
    message = r"cpu ran out of memory in epoch 1, .* with 2 images of up to 32x32 and 2 objects: \d \(32x32\)"
    with pytest.raises(UserError, match=message):
        tiny_run({"device": Device(device="cpu"), "hungry": hungry}, work_dir=tmp_path)


def test_memory_that_runs_out_in_validation_says_so(tmp_path: Path):
    @plugin
    class Hungry:
        """Wants a petabyte to detect."""

        @hookimpl(tryfirst=True)
        def val_step(self) -> None:
            torch.empty(2**50, dtype=torch.uint8)

    message = r"cpu ran out of memory in validation after iteration 1, with 2 im.* Try a smaller val_batch_size, "
    with pytest.raises(UserError, match=message):
        tiny_run({"device": Device(device="cpu"), "hungry": Hungry()}, validate="1 iter", work_dir=tmp_path)


@pytest.mark.parametrize("event", ["train_step", "after_train_iter"])
def test_an_operation_without_a_repeatable_algorithm_is_named(event: str, tmp_path: Path):
    def vary() -> None:
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))

    @plugin
    class Forward:
        """Varies in forward."""

        @hookimpl(tryfirst=True)
        def train_step(self) -> None:
            vary()

    @plugin
    class Backward:
        """Varies in backward."""

        @hookimpl
        def after_train_iter(self) -> None:
            vary()

    varying = Forward() if event == "train_step" else Backward()
    with pytest.raises(
        ConfigError, match=r"deterministic: torch has no algorithm for put_ whose results repeat on cpu"
    ):
        tiny_run({"device": Device(device="cpu", deterministic=True), "varying": varying}, work_dir=tmp_path)
    tiny_run({"device": Device(device="cpu"), "varying": varying}, until="1 iter", work_dir=tmp_path)


def test_the_cause_of_an_error_of_another_is_kept(tmp_path: Path):
    @plugin
    class Broken:
        """Fails for a reason."""

        @hookimpl(tryfirst=True)
        def val_step(self) -> None:
            raise RuntimeError("no light") from KeyError("lamp")

    with pytest.raises(RuntimeError, match="no light") as caught:
        tiny_run({"device": Device(device="cpu"), "broken": Broken()}, validate="1 iter", work_dir=tmp_path)
    assert isinstance(caught.value.__cause__, KeyError)


@plugin
class Model:
    """A detector with another body."""

    body: Any = state(default=None)
    _tiny: Any = state(factory=lambda: TinyDetector(dropout=0))

    @hookimpl
    def build_model(self, run: Run) -> Any:
        head = torch.nn.LazyLinear(4 + len(run.classes))
        model = torch.nn.Sequential(self.body, head)
        model(torch.zeros(2, 3, 32, 32))
        return model

    @hookimpl
    def train_step(self, run: Run, model: Any, batch: Batch) -> Any:
        return self._tiny.train_step(run, model, batch)


class View(torch.nn.Module):
    """A convolution whose result is viewed as a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, 4)
        self.place = torch.nn.Parameter(torch.zeros(1, 4, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.conv(x).view(len(x), -1) + self.place.view(1, -1)
        return found


class Excepted(View):
    """The same, which says so; its input is as a region of interest is."""

    channels_last = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.contiguous())


def model(body: torch.nn.Module) -> Model:
    made = Model()
    made.body = body
    return made


def test_weights_of_convolutions_alone_are_channels_last():
    plain, excepted = View(), Excepted()
    ddp.turn(torch.nn.ModuleList([plain, excepted]))
    assert plain.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain.conv.weight.is_contiguous()
    assert plain.place.is_contiguous()
    assert excepted.conv.weight.is_contiguous()


def test_a_view_of_what_is_channels_last_is_said_with_the_line_and_the_option(tmp_path: Path):
    message = (
        r"channels_last: the model calls .view on a tensor that is channels-last .*test_runtime_device.py:\d+ in "
        r"forward\). Call .reshape or .flatten there; or set device.channels_last: false"
    )
    with pytest.raises(ConfigError, match=message):
        tiny_run({"device": Device(), "m": model(View())}, until="1 iter", work_dir=tmp_path)


def test_where_channels_last_is_off_images_are_not_either(tmp_path: Path):
    run = tiny_run({"device": Device(channels_last=False), "m": model(View())}, until="1 iter", work_dir=tmp_path)
    assert run.model[0].conv.weight.is_contiguous()


def test_a_module_may_be_left_out(tmp_path: Path):
    run = tiny_run({"device": Device(), "m": model(Excepted())}, until="1 iter", work_dir=tmp_path)
    assert run.model[0].conv.weight.is_contiguous()


def norm_of_one_value() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 32), torch.nn.BatchNorm2d(4), torch.nn.Flatten())


class Uneven(TinyLoader):
    """A loader that knows its smallest batch."""

    @property
    def smallest_batch(self) -> int:
        return len(self.dataset) % self.batch_size or self.batch_size


@plugin
class UnevenData:
    """Five images in batches of two."""

    size: int = state(default=5)

    @hookimpl
    def build_loader(self, run: Run, mode: str) -> Any:
        dataset = TinyDataset(size=self.size)
        dataset.load()
        return Uneven(dataset, batch_size=2, seed=0, shuffle=False)


def test_batch_norm_over_one_value_is_said_and_found_by_check(tmp_path: Path):
    def plugins() -> dict[str, Any]:
        return {"device": Device(), "data": UnevenData(), "m": model(norm_of_one_value())}

    message = (
        "the model cannot take one image of 32x32: in iteration 3, a normalisation gets a single value a channel, in a "
        "batch of one image. Give the model larger images; .* a loader with drop_last: true"
    )
    with pytest.raises(UserError, match=message):
        tiny_run(plugins(), work_dir=tmp_path)
    with pytest.raises(UserError, match=r"0\.1, a batch norm, gets maps of 1x1, and the data makes a batch"):
        tiny_kernel(plugins(), work_dir=tmp_path).check()
    even = plugins()
    even["data"].size = 6
    tiny_kernel(even, work_dir=tmp_path).check()
    tiny_run(even, until="1 epoch", work_dir=tmp_path)


def test_the_bare_model_has_no_wrapper(tmp_path):
    run = tiny_run({"device": Device(device="cpu")}, until="1 iters", work_dir=tmp_path)
    model = run.model
    assert run.bare_model is model
    run.model = torch.compile(model)
    assert run.bare_model is model
    part = torch.nn.Module()
    part.module = torch.nn.Identity()
    run.model = part
    assert run.bare_model is part, "a part that is called `module` is not a wrapper"


@pytest.mark.parametrize(("tf32", "precision"), [(True, "high"), (False, "highest")])
def test_tf32_is_for_gpus_alone_and_set_back(tf32: bool, precision: str):
    """The settings need no GPU to be made."""

    def precisions() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = precisions()
    for device, expected in (("cuda", (precision, tf32)), ("cpu", before)):
        with settings_of_process.apply(Device(tf32=tf32), torch.device(device)):
            assert precisions() == expected
        assert precisions() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_an_operation_has_as_many_threads_as_asked_for(threads: int, tmp_path: Path):
    seen = []

    @plugin
    class Look:
        """Counts them within a step."""

        @hookimpl
        def train_step(self):
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    tiny_run({"device": Device(threads=threads), "look": Look()}, until="1 iter", work_dir=tmp_path)
    assert seen == [threads]
    assert torch.get_num_threads() == before


def test_a_process_waits_for_the_others_as_long_as_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other of two never comes: 0.6 seconds, and not the half hour of the default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"rank 0: the 2 processes did not meet at 127.0.0.1:\d+: .*imed out"):
        tiny_run({"device": Device(device="cpu", timeout=0.01)}, work_dir=tmp_path)
    assert 0.5 < time.monotonic() - start < 60


def test_options_of_the_wrapper_for_several_processes_reach_it(monkeypatch: pytest.MonkeyPatch):
    """What they do to a run is seen with two processes in `tests/test_distributed_ranks.py`."""
    run: Any = type("Run", (), {"device": torch.device("cpu")})()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for unused, static in ((True, False), (False, True)):
            options = Device(find_unused_parameters=unused, static_graph=static)
            wrapper: Any = ddp.distributed(options, run, torch.nn.Linear(2, 1))
            assert (wrapper.find_unused_parameters, wrapper.static_graph) == (unused, static)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_precision_is_that_of_forward_in_training_validation_and_test(precision: str, dtype: str, tmp_path: Path):
    @plugin
    class Look:
        """Looks at the type of a layer's output, and whether a plugin's own sums are cast."""

        seen: list = state(factory=list)
        cast: list = state(factory=list)

        @hookimpl
        def before_run(self, run):
            run.model[0][0].register_forward_hook(lambda _m, _i, out: self.seen.append((run.mode, out.dtype)))

        @hookimpl(wrapper=True)
        def train_step(self, run):
            losses = yield
            self.cast.append(torch.is_autocast_enabled("cpu"))
            return losses

    for trains, modes in ((True, {"train", "val"}), (False, {"test"})):
        look = Look()
        plugins = {"device": Device(device="cpu", precision=precision), "look": look}
        kernel = tiny_kernel(plugins, work_dir=tmp_path, until="2 iters", validate="every 2 iters")
        run = kernel.run() if trains else kernel.test()
        assert set(look.seen) == {(mode, getattr(torch, dtype)) for mode in modes}
        assert set(look.cast) == ({False} if trains else set())
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
        assert run.precision == precision
