"""Features of images, by an extractor that says what a distance over them may be called.

Shapes: N images, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dig.evaluation.classifier import IMAGES_AT_ONCE, images_at_once, load_classifier
from dig.packages import require
from dig.training.data import DataSet
from dig.training.data.base import pixels_to_unit
from dig.training.data.files import sha256_of, told_by_start


class Extractor(Protocol):
    """What makes features.

    Attributes:
        metric: What the Fréchet distance over its features is called.
        description: Which features they are, to tell comparable numbers from others.
    """

    metric: str
    description: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) uint8 on the device to (N, F)."""


class ClassifierFeatures:
    """The hidden layer of a classifier that was trained on the data set.

    Args:
        path: Of the classifier's file.
        device: Where it runs.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._model = load_classifier(path, device)
        self.spec = self._model.spec
        rate = self.spec.accuracy
        tested = f", accuracy {rate:.2%}" if rate is not None else ""
        self.metric = "Fréchet distance of the classifier"
        self.description = f"classifier {sha256_of(path)[:12]}{tested}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Extractor`."""
        channels, *size = self.spec.shape
        if list(pixels.shape[2:]) != size:
            raise ValueError(
                f"the classifier takes images of {size[0]}x{size[1]}; these are {pixels.shape[2]}x{pixels.shape[3]}"
            )
        return self._model.features(pixels_to_unit(pixels[:, :channels]))

    def check(self, shape: tuple[int, int, int], sets: Iterable[NDArray[np.uint8]]) -> None:
        """Raise ValueError where images of the data, (C, H, W), or the sets of samples, are not of its kind."""
        channels, *size = self.spec.shape
        if list(shape[1:]) != size:
            raise ValueError(
                f"the classifier takes images of {size[0]}x{size[1]}; samples and data are {shape[1]}x{shape[2]}: "
                f"train another classifier with --image-size {shape[1]}, or measure samples of {size[0]}x{size[1]}"
            )
        if shape[0] != channels:
            raise ValueError(
                f"the classifier takes {channels} channels, the data have {shape[0]}; give --channels {channels}, or "
                "train another classifier"
            )
        if channels == 1 and any(map(_has_colour, sets)):
            raise ValueError("the classifier takes grey images, and these samples have colours; train another one")


def _has_colour(images: NDArray[np.uint8]) -> bool:
    """Whether any pixel of (N, H, W, 3) is not grey."""
    parts = (images[start : start + IMAGES_AT_ONCE] for start in range(0, len(images), IMAGES_AT_ONCE))
    return any(bool((part != part[..., :1]).any()) for part in parts)


class InceptionFeatures:
    """torch-fidelity's Inception, with the weights that FID is defined over.

    Args:
        path: Its weights, ``weights-inception-2015-12-05-6726825d.pth``.
        device: Where it runs.

    Raises:
        MissingPackageError: torch-fidelity is not installed.
        ValueError: The weights cannot be read, or are others.
    """

    metric = "FID"

    def __init__(self, path: Path, device: torch.device) -> None:
        require("torch_fidelity", "evaluate --inception")
        if not path.is_file():
            raise ValueError(f"{path} does not exist; --inception takes the file of torch-fidelity's Inception weights")
        try:
            # torch-fidelity unpickles without looking; a file that this reads holds nothing that could run.
            weights = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
            told = told_by_start(path)
            raise ValueError(f"{path} is not read{told}: {' '.join(str(error).split())[:200]}") from None
        _check_weights(path, weights)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            self._model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        except (RuntimeError, TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} holds other weights: {' '.join(str(error).split())[:200]}") from None
        self._model.to(device)
        self.description = f"Inception {sha256_of(path)[:12]}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Extractor`."""
        (features,) = self._model(pixels)
        result: Tensor = features
        return result


def _check_weights(path: Path, weights: object) -> None:
    """Raise ValueError unless these are named, dense, finite tensors."""
    if not isinstance(weights, dict) or not weights:
        raise ValueError(f"{path} holds other weights: no tensors by name")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{path} holds other weights: {str(name)[:60]!r} is no dense tensor")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"{path} is damaged: {str(name)[:60]!r} is not finite")


def extract(extractor: Extractor, batches: Iterable[Tensor], device: torch.device) -> Tensor:
    """Features (N, F) of batches of (n, 3, H, W) uint8 images, on the device.

    Raises:
        ValueError: There are no images, or features that are not finite.
    """
    found = [extractor(batch.to(device)) for batch in batches]
    if not found:
        raise ValueError("none of the images can be read")
    features = torch.cat(found)
    if not bool(features.isfinite().all()):
        raise ValueError(f"{extractor.description}: its features are not finite; its weights are damaged")
    return features


class DatasetBatches:
    """``count`` different images of a data set, none mirrored: (n, 3, H, W) uint8 at a time.

    For one that cannot be read another one is taken, as long as there are any, and none twice.

    Args:
        dataset: Of images.
        count: How many.
        seed: Of the choice.

    Attributes:
        count: As given.
        unreadable: File name → reason, of those met on the way.
    """

    def __init__(self, dataset: DataSet, count: int, seed: int = 0) -> None:
        self._dataset = dataset
        self.count = count
        self._seed = seed
        self.unreadable: dict[str, str] = {}

    def __iter__(self) -> Iterator[Tensor]:
        # Spread over the data set, whose classes may lie one after the other.
        order = np.random.Generator(np.random.Philox(self._seed)).permutation(len(self._dataset)).astype(np.int64)
        chosen, rest = np.sort(order[: self.count]), order[self.count :]
        at_once = images_at_once(self._dataset.sample_shape)
        while len(chosen):
            missing = 0
            for start in range(0, len(chosen), at_once):
                indices = chosen[start : start + at_once]
                samples = self._dataset.fetch_readable(indices)
                self.unreadable |= samples.unreadable
                missing += len(indices) - len(samples.x)
                if len(samples.x):
                    yield ((samples.x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
            chosen, rest = np.sort(rest[:missing]), rest[missing:]


def array_batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """(N, H, W, 3) uint8 as (n, 3, H, W) at a time."""
    at_once = images_at_once(images.shape[1:])
    for start in range(0, len(images), at_once):
        part = images[start : start + at_once]
        yield torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2)))
