"""The operation that a family's backend is named after, alone, beside a truth that fits in memory at any length.

A whole model can be compared with its reference on a small input only, for references take memory and time. What
long sequences alone get wrong (an overflow, the last tokens, one head width's gradient) shows in the operation, whose
truth can be computed in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation and its truth.

    Attributes:
        inputs: By name, in the dtype and with the strides that the model gives the operation: where it splits one
            projection, views of one tensor. Each is made a leaf of its own, with these strides. The gradient of each is
            compared, and each by itself, so that no large one hides a small one.
        run: The backend's kernels on these inputs: one tensor, tokens in the dimension ``tokens``. Where it puts inputs
            together first, the result has the model's strides. Of a case that compiles it is compiled too.
        truth: The same in fp32 or more, from the same numbers, contiguous; differentiable, in memory that grows with
            the number of tokens and not with its square.
        tokens: The dimension of the output, and of every input that has one entry a token, that counts tokens.
        per_token: Names of those inputs. Their gradients are compared stretch by stretch.
    """

    inputs: Mapping[str, Tensor]
    run: Callable[[Mapping[str, Tensor]], Tensor]
    truth: Callable[[Mapping[str, Tensor]], Tensor]
    tokens: int = 1
    per_token: frozenset[str] = field(default_factory=frozenset)
