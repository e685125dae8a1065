"""Buffers full of NaN; and Triton's interpreter, where `tests/conftest.py` has chosen it, made to work as a GPU."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def _round_bf16_to_nearest() -> None:
    """Make the interpreter round fp32 to bf16 as the GPU does, to nearest even; it cuts the low bits off instead.

    Without this, errors in bf16 would be two to three times those of the hardware, all towards zero.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_rounding(values, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(values, source, target, rounding_mode)
        rounded = torch.from_numpy(np.array(values)).bfloat16()
        return rounded.view(torch.int16).numpy().view(np.uint16)

    interpreter._convert_float = convert_rounding


def _multiply_bf16() -> None:
    """Make the interpreter's products read bf16 operands as numbers; it multiplies the integers of their bits."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = np.array(operand.data).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def multiply_numbers(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = multiply_numbers


def _count_by_scalars() -> None:
    """Make a scalar a loop's bound: it is an array of one element, which today's NumPy does not take for a number."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_index


def _scan_rows_at_once() -> None:
    """Make the interpreter's scans go along one axis and take all else at once; it goes element by element."""
    import numpy as np
    from triton.runtime import interpreter

    def scan(self, inputs):
        arrays = [np.moveaxis(np.array(tensor.handle.data), self.axis, 0) for tensor in inputs]
        outputs = [np.empty_like(array) for array in arrays]
        for i in range(len(arrays[0])):
            rows = [self.to_tensor(array[i], tensor.dtype) for array, tensor in zip(arrays, inputs, strict=True)]
            if i:
                before = (
                    self.to_tensor(output[i - 1], tensor.dtype) for output, tensor in zip(outputs, inputs, strict=True)
                )
                rows = self.combine_fn.fn(*before, *rows)
            for output, row in zip(outputs, rows, strict=True):
                output[i] = row.handle.data
        return [
            self.to_tensor(np.moveaxis(output, 0, self.axis), tensor.dtype)
            for output, tensor in zip(outputs, inputs, strict=True)
        ]

    interpreter.ScanOps.generic_scan = scan


def _refuse_tensors_in_constants() -> None:
    """Make the interpreter refuse a tensor inside a constexpr, which a constant of the module times a tensor is there.

    Compiled, the order makes no difference. Triton 3.6's interpreter takes such a tensor and 3.8's fails on it.
    """
    import triton.language as tl

    initialize = tl.constexpr.__init__

    def initialize_with_constant(self, value):
        if isinstance(value, tl.tensor):
            raise TypeError("a tensor in a constexpr, as CONSTANT * tensor makes it: write tensor * CONSTANT")
        initialize(self, value)

    tl.constexpr.__init__ = initialize_with_constant


def _check_every_address() -> None:
    """Make the interpreter refuse a load or store outside the tensors that the kernel was handed.

    A GPU finds such an access only when it leaves the pages that the allocator holds, and a CPU hardly ever.
    """
    import numpy as np
    from triton.runtime import interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    plain = interpreter._interpreter
    hand_over = interpreter.GridExecutor._init_args_hst
    ranges: list[tuple[int, int]] = []

    def noting_ranges(self, args, kwargs):
        handed = hand_over(self, args, kwargs)
        ranges.clear()
        waiting = [*handed[0], *handed[1].values()]
        while waiting:
            argument = waiting.pop()
            if isinstance(argument, tuple | list):
                waiting.extend(argument)
            elif isinstance(argument, TensorDescriptor):
                waiting.append(argument.base)
            elif hasattr(argument, "data_ptr"):
                storage = argument.untyped_storage()
                ranges.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return handed

    def check(pointers, mask, what: str) -> None:
        addresses = pointers[np.asarray(mask).astype(bool)].astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for start, end in ranges:
            inside |= (addresses >= start) & (addresses < end)
        if not inside.all():
            raise AssertionError(f"{what} outside every tensor of the kernel: {np.count_nonzero(~inside)} addresses")

    class Checked:
        def __getattr__(self, name):
            return getattr(plain, name)

        @staticmethod
        def load(pointers, mask, other, dtype):
            check(pointers, mask, "load")
            return plain.load(pointers, mask, other, dtype)

        @staticmethod
        def store(pointers, value, mask):
            check(pointers, mask, "store")
            return plain.store(pointers, value, mask)

    interpreter._interpreter = Checked()
    interpreter.GridExecutor._init_args_hst = noting_ranges


def _patch_each_language_once() -> None:
    """Make the interpreter put its own functions into `triton.language` once a launch; it does at every device call."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[str] = set()

    class Scope:
        """What a launch takes back at its end; a device function's is left in place, as it always is."""

        def __init__(self, scope: object) -> None:
            self.scope = scope

        def restore(self) -> None:
            self.scope.restore()
            patched.clear()

    @functools.cache
    def languages_of(fn) -> set[str]:
        return {module.__name__ for module in (tl, tl.core) if any(x is module for x in fn.__globals__.values())}

    def patch_once(fn):
        if languages_of(fn) <= patched:
            return None
        patched.update(languages_of(fn))
        return Scope(patch(fn))

    interpreter._patch_lang = patch_once


def _find_functions_once() -> None:
    """Make the interpreter look for a module's own functions once; it goes through all that it has at every launch."""
    from triton import language as tl
    from triton.runtime import interpreter

    @functools.cache
    def functions_of(package: object) -> list[tuple[str, object]]:
        # Those of a module that is patched already are none: asked for before the first launch.
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch(package, builder, scope) -> None:
        for name, member in functions_of(package):
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


def _check_overflow_at_once() -> None:
    """Make the interpreter look for integers beyond their type by NumPy; it takes a dozen operations of its own."""
    import numpy as np
    from triton.language.semantic import TritonSemantic

    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self, lhs, rhs, operation) -> None:
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        found = operations[operation.__name__](*(np.asarray(x.handle.data).astype(np.int64) for x in (lhs, rhs)))
        if found.size and not kind.get_int_min_value() <= found.min() <= found.max() <= kind.get_int_max_value():
            raise AssertionError(f"{kind} overflow detected for operation {operation.__name__}")

    TritonSemantic.binary_op_sanitize_overflow_impl = check


def _look_dtypes_up() -> None:
    """Make the interpreter remember NumPy's name of each type; it builds its table anew at every question."""
    import numpy as np
    from triton.runtime import interpreter

    look_up = functools.cache(interpreter._get_np_dtype)
    pointer = np.dtype(np.uint64)
    interpreter._get_np_dtype = lambda kind: pointer if kind.scalar.is_ptr() else look_up(kind.scalar)


def _remember_types() -> None:
    """Make tensors and their types take what follows from dtype and shape from the first that had both.

    Each builds tuples of constants, their type and its name for its shape, which is half of what the interpreter does.
    Two tensors of one shape are broadcast by comparing that, not side by side.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    broadcast = TritonSemantic.broadcast_impl_value
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    types: dict[tuple[object, ...], dict[str, object]] = {}
    tensors: dict[tuple[object, ...], dict[str, object]] = {}

    def without(found: object, *names: str) -> dict[str, object]:
        return {name: value for name, value in found.__dict__.items() if name not in names}

    def block_type(self, element_ty, shape) -> None:
        sides = tuple(getattr(side, "value", side) for side in shape)
        known = types.get((str(element_ty), sides))
        if known is None:
            make_type(self, element_ty, shape)
            known = types[str(element_ty), sides] = without(self, "element_ty") | {"sides": sides}
        self.element_ty = element_ty
        self.__dict__.update(known)

    def tensor(self, handle, type) -> None:
        sides = type.__dict__.get("sides", ())
        known = tensors.get(sides)
        if known is None:
            make_tensor(self, handle, type)
            known = tensors[sides] = without(self, "handle", "type", "dtype")
        self.__dict__.update(known)
        self.handle, self.type, self.dtype = handle, type, type.scalar

    def broadcast_unless_alike(self, lhs, rhs):
        sides = lhs.type.__dict__.get("sides")
        return (lhs, rhs) if sides and sides == rhs.type.__dict__.get("sides") else broadcast(self, lhs, rhs)

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    TritonSemantic.broadcast_impl_value = broadcast_unless_alike


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill every buffer that an operation allocates with NaN, so that an element which no kernel writes can't pass."""
    empty = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        buffer = empty(*args, **kwargs)
        return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

    monkeypatch.setattr(torch, "empty", poisoned)


if os.environ.get("TRITON_INTERPRET") == "1":
    _round_bf16_to_nearest()
    _multiply_bf16()
    _count_by_scalars()
    _scan_rows_at_once()
    _refuse_tensors_in_constants()
    _check_every_address()
    _patch_each_language_once()
    _find_functions_once()
    _check_overflow_at_once()
    _look_dtypes_up()
    _remember_types()


LEVELS = {
    "gradient_rounds": False, "gradient_scan_chunks": 0, "output_backward_parts": False, "gradient_registers": None,
    "output_backward_registers": None,
}  # fmt: skip
ROUNDS = {"gradient_rounds": True, "gradient_scan_chunks": 4, "output_backward_parts": True}
IN_FEW_REGISTERS = {**ROUNDS, "gradient_registers": 168, "output_backward_registers": 168}


@pytest.fixture(params=[LEVELS, IN_FEW_REGISTERS if torch.cuda.is_available() else ROUNDS], ids=["levels", "rounds"])
def backward_form(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, Any]:
    """The recurrence's backward pass by levels, and in rounds and parts; the latter on a GPU at heads of 32 alone."""
    from dig.ops.gla import launches

    chosen = launches.tiles_for

    def tiles_for(q: Any, v: Any) -> Any:
        tiles = chosen(q, v)
        heads = int(q.shape[-1]), int(v.shape[-1])
        may_be = heads == (32, 64) or not torch.cuda.is_available() or request.param is LEVELS
        return replace(tiles, **request.param) if may_be else tiles

    monkeypatch.setattr(launches, "tiles_for", tiles_for)
    return request.param


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
