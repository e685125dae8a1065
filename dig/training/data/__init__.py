"""Data for training: images, idx files and latents, the order that they are seen in, and encoding images to latents."""

from dig.training.data.base import DataError, DataSet, Samples
from dig.training.data.encoding import encode
from dig.training.data.folder import ImageFolder
from dig.training.data.idx import IdxImages
from dig.training.data.latents import LatentShards
from dig.training.data.loader import Batch, Loader, read_batch
from dig.training.data.opening import open_dataset
from dig.training.data.order import DataOrder, Selection
from dig.training.data.shards import LATENT_SCALE, Encoding

__all__ = [
    "LATENT_SCALE",
    "Batch",
    "DataError",
    "DataOrder",
    "DataSet",
    "Encoding",
    "IdxImages",
    "ImageFolder",
    "LatentShards",
    "Loader",
    "Samples",
    "Selection",
    "encode",
    "open_dataset",
    "read_batch",
]
