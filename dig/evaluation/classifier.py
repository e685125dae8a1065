"""A small classifier, trained here on the data set, whose features measure samples where Inception's do not fit.

A Fréchet distance over its features is that of this classifier, and comparable only where the same file made the
features: it is never called FID.

Shapes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dig.training.data import DataOrder, DataSet, Loader
from dig.training.data.files import replacing

HEADER = "dig-classifier"
FEATURES = 128


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """What a classifier is built from, and how well it does.

    Attributes:
        shape: (C, H, W) of its images.
        class_names: Name of each label.
        accuracy: On the images that it was tested with; None where it was not.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    accuracy: float | None = None


class Classifier(nn.Module):
    """Five convolutions with batch norm, mean over the image, one hidden layer: the features.

    Args:
        spec: Images and classes.
    """

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec
        widths, layers = (spec.shape[0], 32, 64, 64, 128, 128), []
        for i, (before, after) in enumerate(pairwise(widths)):
            # Every other one halves the sides.
            layers += [nn.Conv2d(before, after, 3, 1 + i % 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1], FEATURES)
        self.head = nn.Linear(FEATURES, len(spec.class_names))

    def features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] to (N, FEATURES), which the decision is linear in."""
        return F.gelu(self.hidden(self.convolutions(x).mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] to (N, classes) logits."""
        logits: Tensor = self.head(self.features(x))
        return logits


def train_classifier(
    dataset: DataSet,
    *,
    epochs: float = 4,
    batch: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[tuple[int, int, Classifier]]:
    """Train a classifier on images. An iterator: it works while it is iterated, and yields after each step.

    Args:
        dataset: Of pixels.
        epochs: Passes over the data.
        batch: Images a step.
        learning_rate: At its highest; it rises over a tenth of the steps and falls to zero.
        seed: Of the weights and the order of the images.
        device: Where.
        workers: Processes that read the data.

    Yields:
        Steps that lie behind, steps in all, and the classifier, in eval mode after the last.
    """
    steps = max(1, round(epochs * len(dataset) / batch))
    torch.manual_seed(seed)
    spec = ClassifierSpec(shape=dataset.sample_shape, class_names=dataset.class_names)
    model = Classifier(spec).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1)
    order = DataOrder(length=len(dataset), batch_size=batch, seed=seed)
    with Loader(dataset, order, workers=workers) as loader:
        for step in range(1, steps + 1):
            data = next(loader)
            logits = model(data.x.to(device, non_blocking=True))
            loss = F.cross_entropy(logits, data.y.to(device, non_blocking=True), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            yield step, steps, model.eval() if step == steps else model


@torch.no_grad()
def accuracy(model: Classifier, dataset: DataSet, *, batch: int = 1024) -> float:
    """Share of the data set's images that are classified rightly."""
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(dataset), batch):
        indices = np.arange(start, min(start + batch, len(dataset)), dtype=np.int64)
        samples = dataset.fetch(indices, np.zeros(len(indices), dtype=np.bool_))
        right += int((model(samples.x.to(device)).argmax(1).cpu() == samples.y).sum())
    return right / len(dataset)


def save_classifier(model: Classifier, spec: ClassifierSpec, path: Path) -> None:
    """Write a classifier, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {HEADER: json.dumps(asdict(spec))})


def load_classifier(path: Path, device: torch.device | str) -> Classifier:
    """Read what `save_classifier` wrote, in eval mode.

    Raises:
        ValueError: The file is something else, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the classifier {path}: {error}") from None
    if header is None:
        raise ValueError(f"{path} is no classifier; python -m dig classifier --out {path} trains one")
    content: dict[str, Any] = json.loads(header)
    spec = ClassifierSpec(
        shape=tuple(content["shape"]), class_names=tuple(content["class_names"]), accuracy=content["accuracy"]
    )
    model = Classifier(spec)
    model.load_state_dict(tensors)
    return model.to(device).eval()
