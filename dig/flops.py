"""FLOPs of a model, counted by `torch.utils.flop_counter.FlopCounterMode` on tensors without memory: nothing runs.

Matrix products, convolutions, attention and recurrences count, two FLOPs a multiply-add; norms, activations and other
element-wise work does not. What is counted is what a model needs, whichever kernels run it: `model_macs` counts its
reference (`dig.family.Family.reference`), which runs on any device, and a family without one is counted as it is.

PyTorch's operations are known to the counter. One's own get a formula with
`torch.utils.flop_counter.register_flop_formula` (`dig.ops.formulas` has this project's, `baselines.attention`
FlashAttention's); an operation without one is an error here, never a zero. A Python function that is no such operation
(a Triton kernel or an extension called as it is), or that does more than the model needs (a recurrence in chunks), says
with `counts_as` what it needs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dig.meta import on_meta

if TYPE_CHECKING:
    from dig.layers import Backbone
    from dig.spec import ModelSpec

P = ParamSpec("P")
R = TypeVar("R")

_KNOWN = frozenset({"aten", "prim", "prims", "profiler"})
"""Namespaces of PyTorch itself, whose operations the counter knows or which multiply no matrices."""
_tallies: list[list[int]] = []
"""While a model is counted: FLOPs of the functions that said what they need."""


class UncountedError(ValueError):
    """A model's FLOPs cannot be counted; the message says what to declare."""


def counts_as(flops: Callable[P, int], result: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Say of a function what it needs and what comes out of it, for a count; at any other time it is what it was.

    Args:
        flops: Its arguments to FLOPs.
        result: Its arguments to tensors like its result; they have shapes and dtypes, and no memory.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def counted(*arguments: P.args, **named: P.kwargs) -> R:
            if not _tallies:
                return function(*arguments, **named)
            _tallies[-1].append(flops(*arguments, **named))
            return result(*arguments, **named)

        return counted

    return decorate


class _Formulas(dict[Any, Any]):
    """What the counter looks an operation's formula up in; keeps the names of those that it has none for."""

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__(formulas)
        self.lacking: set[str] = set()

    def __contains__(self, operation: object) -> bool:
        known = super().__contains__(operation)
        if not known and isinstance(operation, torch._ops.OpOverloadPacket):
            namespace, _, name = str(operation).partition(".")
            if namespace not in _KNOWN:
                self.lacking.add(f"{namespace}::{name}")
        return known


def _added_product_flops(total: Sequence[int], a: Sequence[int], b: Sequence[int], *rest: Any, **named: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _attention_flops(q: Sequence[int], k: Sequence[int], v: Sequence[int], *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


@functools.cache
def _beside_torch() -> dict[Any, Any]:
    """Formulas that the counter lacks: of products that add in place, and of attention on a CPU."""
    aten = torch.ops.aten
    return {
        aten.addmm_: _added_product_flops,
        aten.baddbmm_: _added_product_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }


@contextmanager
def _counting() -> Iterator[list[int]]:
    _tallies.append([])
    try:
        yield _tallies[-1]
    finally:
        _tallies.pop()


def _state(value: Any) -> Hashable:
    """What two blocks must have in common to do the same work: everything in them but the numbers in their tensors.

    A module whose fields say more than that has a method ``work_state``, which returns what does.
    """
    if isinstance(value, Tensor):
        return tuple(value.shape), tuple(value.stride()), value.dtype
    if isinstance(value, nn.Module):
        said = getattr(value, "work_state", None)
        return type(value), said() if callable(said) else _state(vars(value))
    if isinstance(value, dict):
        return tuple((name, _state(entry)) for name, entry in value.items())
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_state, value))
    if isinstance(value, set):
        return frozenset(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), _state(vars(value)) if hasattr(value, "__dict__") else id(value)
    return value if isinstance(value, int | float | str | None) else id(value)


def _another(tensor: Tensor) -> Tensor:
    """One like it, which is differentiated where it is."""
    return torch.empty_like(tensor).requires_grad_(tensor.requires_grad)


class EqualBlocks:
    """Counts equal blocks of a model once: with equal arguments they need as much, and give tensors of equal shapes.

    Args:
        model: Its lists of modules are looked through.
        total: What has been counted so far.
    """

    def __init__(self, model: nn.Module, total: Callable[[], int]) -> None:
        self._total = total
        self._known: dict[Hashable, tuple[int, Any]] = {}
        self._blocks = [block for part in model.modules() if isinstance(part, nn.ModuleList) for block in part]
        self.repeated = 0

    def __enter__(self) -> EqualBlocks:
        # All states first: a block within a block has another forward by then.
        for block, state in [(block, _state(block)) for block in self._blocks]:
            block.forward = functools.partial(self._forward, block.forward, state)
        return self

    def __exit__(self, *exception: object) -> None:
        for block in self._blocks:
            del block.forward

    def _forward(self, forward: Callable[..., Any], state: Hashable, *arguments: Any, **named: Any) -> Any:
        key = state, _state(arguments), _state(named)
        if key in self._known:
            needed, result = self._known[key]
            self.repeated += needed
        else:
            before = self._total() + self.repeated
            result = forward(*arguments, **named)
            self._known[key] = self._total() + self.repeated - before, result
        return tree_map_only(Tensor, _another, result)


def _count(model: Backbone, device: str) -> int:
    """Multiply-adds of a forward pass on tensors without memory, of ``meta`` or fake ones of a CPU."""
    counter = FlopCounterMode(display=False, custom_mapping=_beside_torch())
    counter.flop_registry = formulas = _Formulas(counter.flop_registry)
    fake = FakeTensorMode(allow_non_fake_inputs=True) if device == "cpu" else nullcontext()
    with _counting() as tally, torch.no_grad(), fake:
        x = torch.empty(1, model.in_channels, *model.input_size, device=device)
        t, y = torch.empty(1, device=device), torch.empty(1, dtype=torch.int64, device=device)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = {
            name: torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            for name, tensor in tensors.items()
        }
        with counter, EqualBlocks(model, lambda: counter.get_total_flops() + sum(tally)) as blocks:
            torch.func.functional_call(model, weights, (x, t, y))
    if formulas.lacking:
        names = ", ".join(sorted(formulas.lacking))
        raise UncountedError(
            f"the FLOPs of {type(model).__name__} were not counted: {names} has no formula; "
            "give it one with torch.utils.flop_counter.register_flop_formula"
        )
    return (counter.get_total_flops() + sum(tally) + blocks.repeated) // 2


_counted: dict[Hashable, int] = {}


def model_macs(spec: ModelSpec, model: Backbone | None = None) -> int:
    """Multiply-adds of a forward pass for one image, counted on the model's reference, which computes the same.

    Args:
        spec: The model.
        model: It, where it is built already: counted if it is its own reference, and not built again.

    Raises:
        UncountedError: As of `forward_macs`.
    """
    from dig.registry import parse_name

    twin = spec.reference()
    family, size, patch = parse_name(twin.name)
    key = (family.build, size, patch, *twin.options.items(), twin.input_size, twin.in_channels)
    if key not in _counted:
        if model is None or twin != spec:
            with on_meta():
                model = twin.build()
        _counted[key] = forward_macs(model)
    return _counted[key]


def forward_macs(model: Backbone) -> int:
    """Multiply-adds of a forward pass for one image as this model computes it; it is left as it is.

    Raises:
        UncountedError: It has an operation without a formula, or does what cannot be done without memory.
    """
    try:
        return _count(model, "meta")
    except UncountedError:
        raise
    except Exception:  # Anybody's model may raise anything here.
        # The meta device is none that autocast or the like knows; fake tensors of a CPU are one, and take longer. What
        # they raise is told.
        pass
    try:
        return _count(model, "cpu")
    except UncountedError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0]
        raise UncountedError(
            f"the FLOPs of {type(model).__name__} were not counted: on tensors without memory it raises "
            f"{type(error).__name__}: {said:.200}; say what such a function needs with dig.flops.counts_as"
        ) from error
