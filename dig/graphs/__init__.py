"""Steps as CUDA graphs: `capture` for a step with inputs, `record` for one that owns its warm-up."""

from __future__ import annotations

from dig.graphs.capturing import Captured, capture
from dig.graphs.recording import CaptureError, on_capture_stream, record

__all__ = ["CaptureError", "Captured", "capture", "on_capture_stream", "record"]
