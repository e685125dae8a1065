"""A module with families of one's own, as a user's package would have it, and commands that are run on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dig.environment import ROOT

MODULE = '''
"""A backbone in few lines."""
from torch import nn

from dig.layers import Backbone
from dig.registry import register


@register(sizes=("S", "B"))
class Plain(Backbone):
    def __init__(self, size, **shape):
        super().__init__(**shape)
        self.conv = nn.Conv2d(shape["in_channels"], 2 * shape["in_channels"], 1)

    def forward(self, x, t, y):
        return self.conv(x) * (1 + t.view(-1, 1, 1, 1)) + y.view(-1, 1, 1, 1)


@register(name="Two-Ways", sizes=("S",), options={"backend": ("plain", "fast"), "shade": ("light", "dark")},
          gpu_only=frozenset({"fast"}), on_gpu="fast", reference="Two-Ways:plain")
def two_ways(size, *, backend, shade="light", **shape):
    return Plain(size, **shape)


NOTHING = 3
'''


def run(*words: str, folder: Path, module: str = "bench") -> subprocess.CompletedProcess[str]:
    """A command, started where the module of one's own lies."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    return subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
