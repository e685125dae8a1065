"""DiG: diffusion models with gated linear attention (arXiv 2405.18428): model, operations, checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dig.graphs import Captured, CaptureError, capture

__version__ = "0.1.0"
__all__ = ["CaptureError", "Captured", "__version__", "capture"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for: ``import dig`` takes no time."""
    if name in ("CaptureError", "Captured", "capture"):
        import dig.graphs

        return getattr(dig.graphs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
