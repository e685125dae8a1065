"""What part of a step a kernel is: a matrix product, the family's heart (whatever mixes tokens), or the rest.

By the operation that launched it where there is one, else by its name. A kernel that fuses several things counts for
the operation that it was written for: DiG's recurrence with its decays, norm and gate is the heart, SwiGLU inside its
products is a product.
"""

from __future__ import annotations

import re

from bench.store.profiles import PartName

_HEART_OPERATIONS = re.compile(r"attention|flash|softmax|::bmm|::baddbmm|gla|selective_scan|mamba_chunk|sdpa", re.I)
"""Batched products are attention's alone in these models: layers multiply by one matrix, `mm` and `addmm`."""
_HEART_KERNELS = re.compile(
    r"flash|fmha|sdpa|softmax|selective_scan|chunk_gla|chunk_fwd|chunk_bwd|chunk_local_cumsum|fused_recurrent|"
    r"fused_chunk|\bgla_", re.I,
)  # fmt: skip
"""Of FlashAttention, cuDNN's attention, flash-linear-attention and mamba-ssm, which launch beside PyTorch's operators;
and softmax."""
_PRODUCT_OPERATIONS = re.compile(r"^aten::(mm|addmm|linear|matmul|addmv|mv)$|^dig::project_")
_PRODUCT_KERNELS = re.compile(r"gemm|nvjet|cutlass|cublas|splitkreduce|matmul|_mm_|swiglu_kernel|addmm", re.I)


def part_of(operation: str, kernel: str) -> PartName:
    """The part that a kernel's time counts for.

    Args:
        operation: As the dispatcher calls it, ``aten::mm``; empty where none launched it.
        kernel: Its name, in full; of a CPU the operation once more.
    """
    if _HEART_OPERATIONS.search(operation) or _HEART_KERNELS.search(kernel):
        return "heart"
    if _PRODUCT_OPERATIONS.search(operation) or (kernel != operation and _PRODUCT_KERNELS.search(kernel)):
        return "products"
    return "rest"
