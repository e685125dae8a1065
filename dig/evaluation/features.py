"""Features of images, by an extractor that says what a distance over them may be called.

Shapes: N images, C channels, H rows, W columns, F features.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dig.evaluation.classifier import load_classifier
from dig.packages import require
from dig.training.data import DataSet
from dig.training.data.base import pixels_to_unit
from dig.training.data.files import sha256_of

IMAGES_AT_ONCE = 500


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
        rate = self._model.spec.accuracy
        tested = f", accuracy {rate:.2%}" if rate is not None else ""
        self.metric = "Fréchet distance of the classifier"
        self.description = f"classifier {sha256_of(path)[:12]}{tested}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Extractor`."""
        channels, *size = self._model.spec.shape
        if list(pixels.shape[2:]) != size:
            raise ValueError(
                f"the classifier takes images of {size[0]}x{size[1]}; these are {pixels.shape[2]}x{pixels.shape[3]}"
            )
        return self._model.features(pixels_to_unit(pixels[:, :channels]))


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
            torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, OSError, EOFError, RuntimeError) as error:
            raise ValueError(f"{path} is not read: {' '.join(str(error).split())[:200]}") from None
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            self._model = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} holds other weights: {' '.join(str(error).split())[:200]}") from None
        self._model.to(device)
        self.description = f"Inception {sha256_of(path)[:12]}"

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """See `Extractor`."""
        (features,) = self._model(pixels)
        result: Tensor = features
        return result


def extract(extractor: Extractor, batches: Iterator[Tensor], device: torch.device) -> Tensor:
    """Features (N, F) of batches of (n, 3, H, W) uint8 images, on the device."""
    return torch.cat([extractor(batch.to(device)) for batch in batches])


def dataset_batches(dataset: DataSet, count: int, seed: int = 0) -> Iterator[Tensor]:
    """``count`` different images of a data set, none mirrored: (n, 3, H, W) uint8 at a time."""
    # Spread over the data set, whose classes may lie one after the other.
    chosen = np.sort(np.random.Generator(np.random.Philox(seed)).permutation(len(dataset))[:count]).astype(np.int64)
    for start in range(0, len(chosen), IMAGES_AT_ONCE):
        indices = chosen[start : start + IMAGES_AT_ONCE]
        x = dataset.fetch(indices, np.zeros(len(indices), dtype=np.bool_)).x
        yield ((x + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


def array_batches(images: NDArray[np.uint8]) -> Iterator[Tensor]:
    """(N, H, W, 3) uint8 as (n, 3, H, W) at a time."""
    for start in range(0, len(images), IMAGES_AT_ONCE):
        part = images[start : start + IMAGES_AT_ONCE]
        yield torch.from_numpy(np.ascontiguousarray(part.transpose(0, 3, 1, 2)))


def read_samples(path: Path) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The images (N, H, W, 3) of an npz file, and what it says of them ({} if nothing).

    Raises:
        ValueError: The file holds no images.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if "latents" in file:
                raise ValueError(f"{path} holds latents; sample again with --vae to get images")
            images = file["arr_0"]
            about: dict[str, Any] = json.loads(str(file["about"])) if "about" in file else {}
    except KeyError:
        raise ValueError(f"{path} holds no arr_0; it is no file of samples") from None
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"cannot read {path}: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{path} must hold images as (N, H, W, 3) uint8; got {images.shape} {images.dtype}")
    return (images if images.shape[3] == 3 else images.repeat(3, axis=3)), about
