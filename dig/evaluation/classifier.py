"""A small classifier, trained here on the data set, whose features measure samples where Inception's do not fit.

A Fréchet distance over its features is that of this classifier, and comparable only where the same file made the
features: it is never called FID.

Shapes: N images, C channels, H rows, W columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dig.memory import check_memory
from dig.meta import on_meta
from dig.training.data import DataOrder, DataSet, Loader
from dig.training.data.checks import check_between, check_names, check_shape, check_whole
from dig.training.data.files import told_by_start

HEADER = "dig-classifier"
WIDTHS = (32, 64, 64, 128, 128)
FEATURES = 128
MAX_EPOCHS = 1_000_000


IMAGES_AT_ONCE = 500
VALUES_AT_ONCE = 2**27
"""No more pixels times channels than these, however few images they are."""


def images_at_once(shape: tuple[int, ...]) -> int:
    """How many images of a shape (C, H, W) an extractor takes at once."""
    return max(1, min(IMAGES_AT_ONCE, VALUES_AT_ONCE // math.prod(shape)))


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

    def __post_init__(self) -> None:
        """Raise ValueError on a field that no classifier may have; fields may come from a file."""
        check_shape("shape", self.shape)
        if self.shape[0] not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels; got {self.shape[0]}")
        check_names("class_names", self.class_names)
        if self.accuracy is not None:
            check_between("accuracy", self.accuracy, -1e-9, 1)


class Classifier(nn.Module):
    """Five convolutions with batch norm, mean over the image, one hidden layer: the features.

    Args:
        spec: Images and classes.
    """

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec
        widths, layers = (spec.shape[0], *WIDTHS), []
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


@dataclass(frozen=True, kw_only=True)
class Training:
    """How far `train_classifier` has come.

    Attributes:
        step: Steps that lie behind.
        steps: In all.
        model: The classifier, in eval mode after the last step.
        unreadable: File name → reason, of every image that another one replaced.
    """

    step: int
    steps: int
    model: Classifier
    unreadable: Mapping[str, str]


def train_classifier(
    dataset: DataSet,
    *,
    epochs: float = 4,
    batch: int = 256,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[Training]:
    """Train a classifier on images. An iterator: it works while it is iterated, and yields after each step.

    Args:
        dataset: Of pixels.
        epochs: Passes over the data.
        batch: Images a step.
        learning_rate: At its highest; it rises over a tenth of the steps and falls to zero.
        seed: Of the weights and the order of the images.
        device: Where.
        workers: Processes that read the data.

    Raises:
        ValueError: An argument is out of its range, asks for more memory than there is, or training did not converge.
        DataError: The data can't be read.
    """
    check_between("epochs", epochs, 0, MAX_EPOCHS)
    check_whole("batch", batch, least=2)
    check_whole("seed", seed, least=0)
    # Of the first layer: before and after the normalisation, and rectified.
    activations = 3 * 4 * batch * WIDTHS[0] * math.prod(dataset.sample_shape[1:])
    check_memory(
        {"the first layer's activations": activations},
        device=torch.device(device).type,
        advice="choose a smaller --batch or --image-size",
    )
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
            if step == steps:
                model.eval()
                if not all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values()):
                    raise ValueError(
                        "the classifier's weights are not finite after training; try another --seed or --batch"
                    )
            yield Training(step=step, steps=steps, model=model, unreadable=loader.unreadable)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How well a classifier does: share of the images that it classifies rightly, and which could not be read."""

    rate: float
    unreadable: Mapping[str, str]


@torch.no_grad()
def accuracy(model: Classifier, dataset: DataSet) -> Accuracy:
    """Measure a classifier on all images of a data set that can be read.

    Raises:
        ValueError: None of them can.
    """
    device = next(model.parameters()).device
    right = read = 0
    unreadable: dict[str, str] = {}
    batch = images_at_once(dataset.sample_shape)
    for start in range(0, len(dataset), batch):
        samples = dataset.fetch_readable(np.arange(start, min(start + batch, len(dataset)), dtype=np.int64))
        unreadable |= samples.unreadable
        if len(samples.x):
            read += len(samples.x)
            right += int((model(samples.x.to(device)).argmax(1).cpu() == samples.y).sum())
    if not read:
        raise ValueError(f"none of the images of {dataset.name} can be read")
    return Accuracy(rate=right / read, unreadable=unreadable)


def classifier_bytes(model: Classifier, spec: ClassifierSpec) -> bytes:
    """A classifier as the content of a file, which `load_classifier` reads."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    return save(tensors, {HEADER: json.dumps(asdict(spec))})


def read_spec(path: Path) -> ClassifierSpec | None:
    """What the file of a classifier says of it; None for any other safetensors file.

    Raises:
        ValueError: The file cannot be read, or is damaged.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"cannot read the classifier {path}: it is no file")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
        if header is None:
            return None
        content: dict[str, Any] = json.loads(header)
        return ClassifierSpec(
            shape=tuple(content["shape"]), class_names=tuple(content["class_names"]), accuracy=content["accuracy"]
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the classifier {path}: {_one_line(error)}{told_by_start(path)}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the classifier {path} is damaged: {_one_line(error)}") from None


def load_classifier(path: Path, device: torch.device | str) -> Classifier:
    """Read what `classifier_bytes` made, in eval mode.

    Raises:
        ValueError: The file is something else, or damaged.
    """
    spec = read_spec(path)
    if spec is None:
        raise ValueError(f"{path} is no classifier; python -m dig classifier --out OTHER trains one")
    with on_meta():
        expected = Classifier(spec).state_dict()
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if shapes != {name: list(tensor.shape) for name, tensor in expected.items()}:
                raise ValueError(f"the classifier {path} is damaged, or of another version: its tensors are others")
            tensors = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the classifier {path}: {_one_line(error)}") from None
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype or not bool(tensor.isfinite().all()):
            raise ValueError(f"the classifier {path} is damaged: {name} is {tensor.dtype}, or not finite")
    model = Classifier(spec)
    model.load_state_dict(tensors)
    return model.to(device).eval()


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:200]
