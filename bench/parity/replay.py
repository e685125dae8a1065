"""Whether a CUDA graph computes what its step computes when it is launched eagerly."""

from __future__ import annotations

from torch import Tensor

from bench.parity.error import ParityError, relative_error

REPLAY_ERROR = 1e-2
"""Of a graph's output, relative to the eager step's: the same kernels on the same numbers."""


def check_replay(eager: Tensor, replayed: Tensor) -> None:
    """Compare a forward pass' output as launched eagerly with what its CUDA graph writes, from the same inputs.

    A graph keeps addresses: of memory that was reused, or an input that was replaced, it reads what is there by then.
    (A training step moves the weights, so that its next result is another one anyway.)

    Raises:
        ParityError: They differ by more than kernels that add in another order do.
    """
    error = relative_error(replayed.float().cpu(), eager)
    if not error <= REPLAY_ERROR:
        raise ParityError(f"its CUDA graph computes something else than its eager step: they differ by {error:.2g}")
