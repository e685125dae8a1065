"""What a row's environment says that only a process with torch knows."""

from __future__ import annotations

import os
from typing import Any

import torch


def versions(device: str) -> dict[str, Any]:
    """Versions and settings of torch, as far as they matter to what runs on ``cuda`` or ``cpu``."""
    found: dict[str, Any] = {"torch": torch.__version__, "float32_matmul": torch.get_float32_matmul_precision()}
    if device == "cpu":
        return found | {"threads": torch.get_num_threads()}
    found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | {"allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")}
