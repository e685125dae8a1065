"""What part of a step a kernel is: a matrix product, the family's heart (whatever mixes tokens), or the rest.

By the operation that launched it where there is one, else by its name. A kernel that fuses several things counts for
the operation that it was written for: DiG's recurrence with its decays, norm and gate is the heart, SwiGLU inside its
products is a product.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.store.profiles import PartName

_HEART_OPERATIONS = re.compile(r"attention|flash|softmax|gla|selective_scan|mamba_chunk|sdpa", re.I)
_BATCHED = re.compile(r"^aten::(bmm|baddbmm)$")
"""Products of many matrices are attention's in these models, a matrix a head. A layer multiplies by one matrix, which
an ``einsum`` makes a batch of one."""
_HEART_KERNELS = re.compile(
    r"flash|fmha|sdpa|softmax|selective_scan|chunk_gla|chunk_fwd|chunk_bwd|chunk_local_cumsum|fused_recurrent|"
    r"fused_chunk|\bgla_", re.I,
)  # fmt: skip
"""Of FlashAttention, cuDNN's attention, flash-linear-attention and mamba-ssm, which launch beside PyTorch's operators;
and softmax."""
_PRODUCT_OPERATIONS = re.compile(r"^aten::(mm|addmm|linear|matmul|addmv|mv)$|^dig::project_")
_PRODUCT_KERNELS = re.compile(
    r"gemm|nvjet|cutlass|cublas|splitkreduce|matmul|_mm_|swiglu_kernel|grouped_product|addmm", re.I
)


def part_of(operation: str, kernel: str, shapes: Sequence[Sequence[int]] = ()) -> PartName:
    """The part that a kernel's time counts for.

    Args:
        operation: As the dispatcher calls it, ``aten::mm``; empty where none launched it.
        kernel: Its name, in full; of a CPU the operation once more.
        shapes: Of the operation's arguments, empty for what is no tensor.
    """
    if _BATCHED.search(operation):
        batches = [shape[0] for shape in shapes if len(shape) == 3]
        return "heart" if not batches or max(batches) > 1 else "products"
    if _HEART_OPERATIONS.search(operation) or _HEART_KERNELS.search(kernel):
        return "heart"
    if _PRODUCT_OPERATIONS.search(operation) or (kernel != operation and _PRODUCT_KERNELS.search(kernel)):
        return "products"
    return "rest"
