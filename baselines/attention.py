"""Softmax attention by name: FlashAttention 2, 3 and 4, PyTorch's kernels, and the plain form, each or an error.

Shapes: B batch, T tokens, H heads, K head width. Tensors are (B, T, H, K), as the projections leave them.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_backward_flop_count, sdpa_flop_count

from dig.operation import Operation
from dig.packages import MissingPackageError, require

if TYPE_CHECKING:
    from dig.layers import Backbone

Backend = Literal[
    "materialized", "sdpa-flash", "sdpa-cudnn", "flash-attn", "flash-attn-3", "flash-attn-4", "flash-attn-4-padded"
]
PADDED_WIDTH = 96
"""Head width of ``flash-attn-4-padded``: FlashAttention 4's gradient of the queries is wrong at 72, XL's, on Hopper."""
TRUTH_ROWS = 1024
"""Queries that the truth looks at together."""

Shape = Sequence[int]


def attend(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all tokens, (B, T, H, K) to the same, by the kernel that is named.

    Raises:
        MissingPackageError: Its package is not installed, or another one lies in its place.
    """
    if backend == "flash-attn":
        # Its backward pass adds in any order, unless it is asked not to.
        repeats = torch.are_deterministic_algorithms_enabled()
        output: Tensor = require("flash_attn", "backend='flash-attn'").flash_attn_func(q, k, v, deterministic=repeats)
        return output
    if backend == "flash-attn-3":
        found = require("flash_attn_interface", "backend='flash-attn-3'").flash_attn_func(q, k, v)
        first: Tensor = found[0] if isinstance(found, tuple) else found
        return first
    if backend in ("flash-attn-4", "flash-attn-4-padded"):
        width, scale = q.shape[-1], q.shape[-1] ** -0.5
        if backend == "flash-attn-4-padded":
            q, k, v = (F.pad(x, (0, PADDED_WIDTH - width)) for x in (q, k, v))
        operation: Tensor = torch.ops.baselines.flash_attention_4(q, k, v, scale)[0]
        return operation[..., :width]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if backend == "materialized":
        return (((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2)
    # With one backend allowed, PyTorch raises where that one cannot run, instead of falling back.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION if backend == "sdpa-flash" else SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def split_heads(projected: Tensor, heads: int) -> tuple[Tensor, ...]:
    """q, k and v of a block's one projection (B, T, 3D): views of it, (B, T, H, K) each, not contiguous."""
    return projected.unflatten(-1, (3, heads, -1)).unbind(2)


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in the inputs' dtype, (B, T, H, K) to the same; `TRUTH_ROWS` queries at a time.

    Scores are formed again on the way back, so that memory grows with the number of tokens, not with its square.
    """
    k, v = k.transpose(1, 2), v.transpose(1, 2)

    def rows(part: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((part * part.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v

    parts = q.transpose(1, 2).split(TRUTH_ROWS, dim=2)
    done = [checkpoint(rows, part, k, v, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(done, dim=2).transpose(1, 2)


def attention_of(model: Backbone, batch: int, dtype: torch.dtype) -> Operation:
    """The attention of one block of a DiT or Flash-DiT, at its tokens, heads and head width; see `dig.operation`."""
    config: Any = model.config
    shape = (batch, model.grid[0] * model.grid[1], 3 * config.width)
    packed = torch.randn(shape, device=next(model.parameters()).device).to(dtype)
    # Strided, as the block's own are: kernels choose by strides, and may be wrong for some alone.
    inputs = dict(zip("qkv", split_heads(packed, config.heads), strict=True))
    backend: Backend = config.backend

    def run(given: Mapping[str, Tensor]) -> Tensor:
        return attend(backend, given["q"], given["k"], given["v"])

    def truth(given: Mapping[str, Tensor]) -> Tensor:
        return exact_attention(given["q"], given["k"], given["v"])

    return Operation(inputs=inputs, run=run, truth=truth, tokens=1, per_token=frozenset("qkv"))


@cache
def flash_attention_4() -> ModuleType:
    """The module ``flash_attn.cute.interface``, if it is FlashAttention 4's.

    Raises:
        MissingPackageError: The package flash-attn-4 is not installed, or another package's ``flash_attn/cute`` lies
            before it on the path.
    """
    purpose = "backend='flash-attn-4'"
    if not (spec := importlib.util.find_spec("flash_attn")) or not spec.submodule_search_locations:
        require("flash_attn.cute", purpose)
    assert spec is not None
    folders = [Path(folder) / "cute" for folder in spec.submodule_search_locations or ()]
    interface = next((path for folder in folders if (path := folder / "interface.py").is_file()), None)
    check_is_flash_attention_4(interface)
    try:
        return require("flash_attn.cute.interface", purpose)
    except MissingPackageError:
        raise
    except ImportError as error:
        raise MissingPackageError(f"{purpose} needs {error.name or error}; reinstall flash-attn-4") from error


def check_is_flash_attention_4(interface: Path | None) -> None:
    """Raise MissingPackageError unless a file is the one that the package flash-attn-4 installed.

    Args:
        interface: ``flash_attn/cute/interface.py`` as Python would find it, or None.
    """
    require_distribution = "backend='flash-attn-4' needs the package flash-attn-4; install it with: pip install "
    require_distribution += "flash-attn-4 (see README.md)"
    try:
        files = metadata.files("flash-attn-4") or []
    except metadata.PackageNotFoundError:
        raise MissingPackageError(require_distribution) from None
    if interface is None:
        raise MissingPackageError(f"{require_distribution}: flash_attn/cute is not where Python finds flash_attn")
    recorded = next((file.hash for file in files if str(file) == "flash_attn/cute/interface.py"), None)
    if recorded is None:
        return  # Installed in place: nothing was recorded.
    content = hashlib.new(recorded.mode, interface.read_bytes()).digest()
    if base64.urlsafe_b64encode(content).rstrip(b"=").decode() != recorded.value:
        raise MissingPackageError(
            f"{interface} is not FlashAttention 4's: another package (flash-attn ships an older one) lies over it; "
            "repair it with: pip install --force-reinstall --no-deps flash-attn-4"
        )


@torch.library.custom_op("baselines::flash_attention_4", mutates_args=())
def _flash_attention_4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention 4's forward pass: output (B, T, H, K), and the log-sum-exp (B, H, T) that going back needs."""
    found = flash_attention_4()._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
    return found[0], found[1]


@_flash_attention_4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("baselines::flash_attention_4_backward", mutates_args=())
def _flash_attention_4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = flash_attention_4()._flash_attn_bwd(q, k, v, output, dout, lse, scale)[:3]
    return dq, dk, dv


@_flash_attention_4_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _go_back(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    q, k, v, output, lse = ctx.saved_tensors
    gradients = torch.ops.baselines.flash_attention_4_backward(dout.contiguous(), q, k, v, output, lse, ctx.scale)
    return *gradients, None


_flash_attention_4.register_autograd(_go_back, setup_context=_save)


def _head_major(x: Shape) -> tuple[int, int, int, int]:
    """(B, T, H, K) to (B, H, T, K)."""
    B, T, H, K = x
    return B, H, T, K


def _forward(q: Shape, k: Shape, v: Shape, *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(*map(_head_major, (q, k, v))))


def _backward(dout: Shape, q: Shape, k: Shape, v: Shape, *rest: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(*map(_head_major, (dout, q, k, v))))


register_flop_formula(torch.ops.baselines.flash_attention_4)(_forward)
register_flop_formula(torch.ops.baselines.flash_attention_4_backward)(_backward)


def require_backend(backend: Backend) -> None:
    """Import what a backend needs, and give FlashAttention 2's operations formulas.

    Raises:
        MissingPackageError: It is not installed, or is another package's.
    """
    if backend == "flash-attn":
        require("flash_attn", "backend='flash-attn'")
        for name, formula in (("_flash_attn_forward", _forward), ("_flash_attn_backward", _backward)):
            operation = getattr(torch.ops.flash_attn, name, None)
            if operation is not None and operation not in flop_registry:
                register_flop_formula(operation)(formula)
    elif backend == "flash-attn-3":
        require("flash_attn_interface", "backend='flash-attn-3'")
    elif backend.startswith("flash-attn-4"):
        flash_attention_4()
