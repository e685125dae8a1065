"""DiG: diffusion models with gated linear attention (arXiv 2405.18428): model, operations, checkpoints."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dig.graphs import Captured, CaptureError, capture
    from dig.sampling.api import Samples, load, sample
    from dig.sampling.diffusers_names import match_frequencies

__version__ = "0.1.0"
__all__ = ["CaptureError", "Captured", "Samples", "__version__", "capture", "load", "match_frequencies", "sample"]

_FROM = {
    "CaptureError": "dig.graphs",
    "Captured": "dig.graphs",
    "capture": "dig.graphs",
    "Samples": "dig.sampling.api",
    "load": "dig.sampling.api",
    "sample": "dig.sampling.api",
    "match_frequencies": "dig.sampling.diffusers_names",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: ``import dig`` takes no time."""
    if name in _FROM:
        return getattr(importlib.import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
