"""Variables that torch reads when it is imported, set for every process that measures. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping

DEFAULTS: Mapping[str, str] = {
    # With this, asking whether there is a GPU does not start CUDA, whose state would not survive the fork.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Plain attention trains at 1792 pixels on an 80 GB card only if the allocator does not fragment it.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def set_variables() -> None:
    """Set what the user has not set."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
