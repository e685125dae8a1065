"""Steps as CUDA graphs: `capture` for a step with inputs, `record` for one that owns its warm-up."""

from __future__ import annotations

from dig.graphs.capturing import Captured, capture
from dig.graphs.recording import CaptureError, graphs_end_here, on_capture_stream, record

__all__ = ["CaptureError", "Captured", "capture", "graphs_end_here", "on_capture_stream", "record"]
