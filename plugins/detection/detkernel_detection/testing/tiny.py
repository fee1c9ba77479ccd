"""A whole run of tiny parts, in process, in a fraction of a second."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detkernel.loop import Kernel
from detkernel.plugin import hookimpl, option, plugin, state
from detkernel.run import Mode, Run
from detkernel.testing.plain import kernel_of, with_defaults

from detkernel_detection import Annotations, Batch, Dataset, Detections, Loader, Losses, Target, batching


@plugin
class TinyDataset(Dataset):
    """Small dark images, each with one rectangle in its class's colour."""

    size: int = option(default=8, at_least=1, help="number of images")
    seed: int = option(default=0, help="where the rectangles lie follows from it")
    side: int = option(default=32, at_least=16, help="height and width of an image")
    empty: int = option(default=0, at_least=0, help="number of images, the last ones, that show nothing")
    _boxes: list[tuple[int, int, int, int]] = state(factory=list)

    def load(self) -> None:
        self.classes = ("red", "green", "blue")
        draw = random.Random(self.seed)
        self._boxes.clear()
        for _ in range(self.size):
            x, y = draw.randrange(self.side // 2), draw.randrange(self.side // 2)
            self._boxes.append((x, y, x + self.side // 4 + draw.randrange(8), y + self.side // 4 + draw.randrange(8)))

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Any:
        image = torch.full((3, self.side, self.side), 20).byte()
        for x1, y1, x2, y2 in self._shown(index):
            image[index % 3, y1:y2, x1:x2] = 230
        return image

    def annotations(self, index: int) -> Annotations:
        boxes = np.array(self._shown(index), dtype=np.float64).reshape(-1, 4)
        return Annotations(
            image_id=index,
            path=f"tiny-{index}",
            height=self.side,
            width=self.side,
            boxes=boxes,
            labels=np.full(len(boxes), index % 3),
            area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
            crowd=np.zeros(len(boxes), dtype=bool),
            difficult=np.zeros(len(boxes), dtype=bool),
        )

    def _shown(self, index: int) -> list[tuple[int, int, int, int]]:
        return self._boxes[index : index + 1] if index < self.size - self.empty else []


class TinyLoader:
    """Batches of a data set as they are: no transforms, no workers; the order depends on (seed, epoch)."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int, shuffle: bool) -> None:
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        for number in range(start, len(self)):
            yield make_batch(self.dataset, order[number * self.batch_size : (number + 1) * self.batch_size])


def make_batch(dataset: Dataset, indices: Sequence[int]) -> Batch:
    """A batch of images of one size, untransformed."""
    notes = [dataset.annotations(index) for index in indices]
    return batching.make_batch(
        torch.stack([dataset.image(index) for index in indices]),
        [Target(torch.as_tensor(note.boxes, dtype=torch.float32), torch.as_tensor(note.labels)) for note in notes],
        indices=indices,
        image_ids=[note.image_id for note in notes],
    )


@plugin
class TinyData:
    """Loaders of tiny images, for tests."""

    dataset: Dataset | None = option(default=None, help="the data set; null generates one")
    batch_size: int = option(default=2, at_least=1, help="images a batch")

    @hookimpl
    def build_loader(self, run: Run, mode: Mode) -> Loader:
        dataset = TinyDataset(seed=run.seed) if self.dataset is None else self.dataset  # one not loaded is empty: false
        if not dataset.classes:
            dataset.load()
        return TinyLoader(dataset, self.batch_size, run.seed, shuffle=mode == "train")


@plugin
class TinyDetector:
    """A detector of one box an image, for tests: it trains in milliseconds."""

    dropout: float = option(default=0.1, at_least=0, below=1, help="probability, so that a test sees random numbers")

    @hookimpl
    def build_model(self, run: Run) -> Any:
        nn = torch.nn
        torch.manual_seed(run.seed)
        features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        head = nn.Linear(128, 4 + len(run.classes))
        model: Any = nn.Sequential(features, nn.Flatten(), nn.Dropout(self.dropout), head)
        model.class_outputs = {"3.weight": {"skip": 4}, "3.bias": {"skip": 4}}  # rows: the box, then the classes
        return model

    @hookimpl
    def train_step(self, run: Run, model: Any, batch: Batch) -> Losses:
        out = model(batch.images.float() / 255)
        seen = [i for i, count in enumerate(batch.counts) if count]
        if not seen:
            nothing = 0 * out.sum()  # a gradient all the same: the stepping plugin goes backward from every batch
            return {"loss_cls": nothing, "loss_bbox": nothing}
        boxes = batch.targets.boxes[seen, 0] / batch.images.shape[-1]
        labels = batch.targets.labels[seen, 0]
        functional = torch.nn.functional
        return {
            "loss_cls": functional.cross_entropy(out[seen, 4:], labels),
            "loss_bbox": functional.l1_loss(out[seen, :4], boxes),
        }

    @hookimpl
    def val_step(self, run: Run, batch: Batch) -> Sequence[Detections]:
        run.model.eval()
        with torch.no_grad():
            out = run.model(batch.images.float() / 255)
        run.model.train()
        scores, labels = out[:, 4:].softmax(1).max(1)
        scales = out.new_tensor([(x, y, x, y) for y, x in batch.scales])
        boxes = out[:, :4] * batch.images.shape[-1] / scales
        return [
            Detections(image_id, index, boxes[i : i + 1], scores[i : i + 1], labels[i : i + 1])
            for i, (image_id, index) in enumerate(zip(batch.image_ids, batch.indices, strict=True))
        ]


@plugin(priority="above_normal")
class TinySgd:
    """Plain stochastic gradient descent with momentum, for tests."""

    lr: float = option(default=0.05, above=0, help="learning rate")

    @hookimpl
    def before_run(self, run: Run) -> None:
        run.optimizer = torch.optim.SGD([one for _, one in run.named_parameters()], lr=self.lr, momentum=0.9)
        run.scalars["lr"] = lambda: run.optimizer.param_groups[0]["lr"]
        self._run = run

    @hookimpl
    def after_train_iter(self, run: Run, losses: Losses) -> None:
        run.optimizer.zero_grad()
        sum(loss for name, loss in losses.items() if "loss" in name).backward()  # type: ignore[union-attr]
        run.hook.after_backward(run=run)
        run.hook.before_optimizer_step(run=run)
        run.optimizer.step()
        run.hook.after_optimizer_step(run=run)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._run.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._run.optimizer.load_state_dict(state["optimizer"])


def tiny_kernel(plugins: Mapping[str, object] | None = None, **options: Any) -> Kernel:
    """A kernel with the given plugins by name, and tiny ones for what a run needs and none of them provides.

    `options` are `until` ("4 iters"), `validate`, `work_dir`, `seed` and `recorder`.
    """
    defaults = {
        "model": ("build_model", TinyDetector),
        "data": ("build_loader", TinyData),
        "optimizer": ("after_train_iter", TinySgd),
    }
    return kernel_of(with_defaults(plugins, defaults), **options)


def tiny_run(plugins: Mapping[str, object] | None = None, **options: Any) -> Run:
    """Train a `tiny_kernel` (same arguments) and return its run."""
    return tiny_kernel(plugins, **options).run()
