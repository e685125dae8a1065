"""A thread's launches on a device: what is launched early, and whose the context is."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from dig.ops import launch
from dig.ops.launch import Launch, LaunchContext, launch_context

EARLY = {"EARLY": True, "launch_pdl": True}
IN_ORDER = {"EARLY": True}


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> LaunchContext:
    """On a GPU that launches early, its current stream number 1."""
    monkeypatch.setattr(launch, "launches_early", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(1))
    return LaunchContext(torch.device("cuda:0"))


def stream(number: int) -> Any:
    return SimpleNamespace(cuda_stream=number)


def test_the_first_kernel_after_a_wait_is_not_launched_early(context: LaunchContext) -> None:
    assert context.take_options() == EARLY
    context.stream_waits(stream(1))
    assert [context.take_options(), context.take_options()] == [IN_ORDER, EARLY]


def test_another_streams_wait_holds_up_nothing_here(context: LaunchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    context.stream_waits(stream(2))
    assert context.take_options() == EARLY
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(2))
    assert [context.take_options(), context.take_options()] == [IN_ORDER, EARLY]


def test_below_hopper_nothing_is_launched_early(context: LaunchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launches_early", lambda device: False)
    context.stream_waits(stream(1))
    assert [context.take_options(), context.take_options()] == [{"EARLY": False}] * 2


def test_a_thread_has_one_context_and_no_other_threads() -> None:
    """Autograd's threads launch on streams of their own, and beside the thread of the forward pass."""
    cpu = torch.device("cpu")
    with launch_context(cpu) as here, launch_context(cpu) as nested:
        assert here is nested is launch_context(cpu)
    found: list[LaunchContext] = []
    thread = threading.Thread(target=lambda: found.append(launch_context(cpu)))
    thread.start()
    thread.join()
    assert found[0] is not here


def test_a_device_without_an_index_is_looked_up_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one, which changes; one with an index stays what it is."""
    found = []
    for current in (1, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        found.append(launch_context(torch.device("cuda")))
        assert found[-1] is launch_context(torch.device("cuda", current))
        assert launch_context(torch.device("cuda:1")) is found[0]
    assert found[0] is found[2] is not found[1]


class _Kernel:
    """A Triton kernel as `LaunchContext` sees one: compiled once for each call through Triton."""

    arg_names = ("x", "y", "n", "SIDE", "FLAG")

    def __init__(self) -> None:
        self.pre_run_hooks: list[object] = []
        self.through_triton: list[tuple[object, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: object, **constants: object) -> CompiledKernel:
            self.through_triton.append((grid, *arguments, constants))
            compiled: Any = object.__new__(CompiledKernel)
            compiled._run = lambda *arguments: self.launched.append(arguments)
            compiled.module = compiled.function = f"function {len(self.through_triton)}"
            compiled.packed_metadata = (4, 1, 0)
            return cast(CompiledKernel, compiled)

        return run


@pytest.fixture
def direct(context: LaunchContext, monkeypatch: pytest.MonkeyPatch) -> LaunchContext:
    """On a GPU whose current stream is number 7."""
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda gpu: 7))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    current = [0]
    for module, name in ((torch.cuda, "current_device"), (launch, "_current_gpu")):
        monkeypatch.setattr(module, name, lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    return context


def tensors(*dtypes: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(64, dtype=dtype) for dtype in dtypes)


def test_the_second_launch_is_direct_and_has_the_arguments_in_order(direct: LaunchContext) -> None:
    kernel, first, second = _Kernel(), tensors(torch.float32, torch.int32), tensors(torch.float32, torch.int32)
    direct(kernel, (3, 2), first, (5,), SIDE=16, FLAG=True, num_warps=4)
    direct(kernel, (9,), second, (5,), SIDE=16, FLAG=True, num_warps=4)
    assert kernel.through_triton == [((3, 2), *first, 5, {"SIDE": 16, "FLAG": True, "num_warps": 4})]
    x, y = (each.data_ptr() for each in second)
    metadata = (4, 1, 0)
    assert kernel.launched == [(9, 1, 1, 7, "function 1", metadata, None, None, None, x, y, 5, 16, True)]


def test_tuples_of_tensors_are_launched_as_tuples(direct: LaunchContext) -> None:
    kernel = _Kernel()
    pair, (single,) = tensors(torch.float32, torch.float32), tensors(torch.bfloat16)
    for _ in range(2):
        direct(kernel, (1,), (pair, single), (2,), SIDE=16, FLAG=False)
    assert kernel.launched[0][9:] == (tuple(each.data_ptr() for each in pair), single.data_ptr(), 2, 16, False)


def test_whatever_triton_compiles_anew_for_goes_through_triton(direct: LaunchContext) -> None:
    """A form for one dtype, number, constant or alignment is no form for another."""
    kernel, pair = _Kernel(), tensors(torch.float32, torch.int32)
    plain: dict[str, Any] = {"SIDE": 16, "FLAG": True}
    odd = (pair[0][1:], pair[1])
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (pair, (5,), plain),
        (tensors(torch.bfloat16, torch.int32), (5,), plain),
        (pair, (1,), plain),
        (pair, (5,), {**plain, "SIDE": 32}),
        (pair, (5,), {**plain, "num_warps": 8}),
        (pair, (5,), {"FLAG": 16, "SIDE": True}),
        (odd, (5,), plain),
        (odd, (5,), plain),
        ((pair, pair[0]), (5,), plain),
        (((pair[0][1:], pair[1]), pair[0]), (5,), plain),
    ]
    for arguments, numbers, constants in calls:
        direct(kernel, (1,), arguments, numbers, **constants)
    assert len(kernel.through_triton) == len(calls)
    assert not kernel.launched
    direct(kernel, (1,), pair, (5,), **plain)
    assert kernel.launched[0][4] == "function 1"


def test_other_kernels_have_other_forms(direct: LaunchContext) -> None:
    one, other, pair = _Kernel(), _Kernel(), tensors(torch.float32, torch.int32)
    for kernel in (one, other, one):
        direct(kernel, (1,), pair, (5,), SIDE=16, FLAG=True)
    assert len(one.launched) == 1
    assert not other.launched


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook", "pre_run_hooks"])
def test_hooks_are_told_of_every_launch(direct: LaunchContext, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """Those of Triton's profiler, and of whoever sets one himself."""
    kernel, pair = _Kernel(), tensors(torch.float32, torch.int32)
    direct(kernel, (1,), pair, (5,), SIDE=16, FLAG=True)
    if hook == "pre_run_hooks":
        kernel.pre_run_hooks.append(print)
    else:
        monkeypatch.setattr(launch.knobs.runtime, hook, lambda metadata: None)
    direct(kernel, (1,), pair, (5,), SIDE=16, FLAG=True)
    assert len(kernel.through_triton) == 2
    assert not kernel.launched


def test_forms_are_forgotten_before_there_are_too_many(direct: LaunchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_FORMS", 2)
    kernel, pair = _Kernel(), tensors(torch.float32, torch.int32)
    for number in (1, 2, 3, 3, 1):
        direct(kernel, (1,), pair, (number,), SIDE=16, FLAG=True)
    assert len(kernel.launched) == 1
    assert len(kernel.through_triton) == 4


def started(kernel: _Kernel, **more: Any) -> Launch:
    return Launch(kernel, (3, 2), (5,), SIDE=16, FLAG=True, num_warps=4, **more)


def test_a_launch_made_once_is_direct_the_second_time(direct: LaunchContext) -> None:
    kernel, first, second = _Kernel(), tensors(torch.float32, torch.int32), tensors(torch.float32, torch.int32)
    made = started(kernel)
    direct.start(made, *first)
    direct.start(made, *second)
    assert kernel.through_triton == [((3, 2), *first, 5, {"SIDE": 16, "FLAG": True, "num_warps": 4})]
    x, y = (each.data_ptr() for each in second)
    assert kernel.launched == [(3, 2, 1, 7, "function 1", (4, 1, 0), None, None, None, x, y, 5, 16, True)]


def test_a_launch_has_a_form_for_each_dtype_order_and_device(
    direct: LaunchContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, pair = _Kernel(), tensors(torch.float32, torch.int32)
    made = started(kernel, early=True)
    other = LaunchContext(torch.device("cuda:1"))
    for context in (direct, other):
        context.start(made, *pair)
        context.stream_waits(stream(1))
        context.start(made, *pair)
        context.start(made, *tensors(torch.bfloat16, torch.int32))
        context.start(made, *pair)
    assert [call[-1].get("launch_pdl") for call in kernel.through_triton] == [True, None, True] * 2
    assert [launched[4] for launched in kernel.launched] == ["function 1", "function 4"]


def test_a_launch_is_made_on_its_own_device(direct: LaunchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is the current one, which it is again afterwards."""
    kernel, pair, found = _Kernel(), tensors(torch.float32, torch.int32), []
    compiled, other = kernel.__getitem__, LaunchContext(torch.device("cuda:1"))
    monkeypatch.setattr(
        _Kernel, "__getitem__", lambda self, grid: found.append(torch.cuda.current_device()) or compiled(grid)
    )
    made = started(kernel)
    for context in (other, direct):
        context.start(made, *pair)
        assert torch.cuda.current_device() == 0
    with other:
        direct.start(started(kernel), *pair)
        assert torch.cuda.current_device() == 1
    assert found == [1, 0, 0]


def test_a_launch_of_odd_addresses_goes_through_triton(direct: LaunchContext) -> None:
    kernel, (x, y) = _Kernel(), tensors(torch.float32, torch.int32)
    made = started(kernel)
    for pair in ((x[1:], y), (x, y), (x[1:], y), (x, y)):
        direct.start(made, *pair)
    assert [call[1].data_ptr() % 16 for call in kernel.through_triton] == [4, 0, 4]
    assert len(kernel.launched) == 1


def test_parts_are_launched_where_they_lie(direct: LaunchContext) -> None:
    """Through Triton as views, directly by their addresses; odd ones always as views."""
    kernel, (x, y) = _Kernel(), tensors(torch.float32, torch.bfloat16)
    made = started(kernel, parts=((1, 8), (0, 4), (1, 0)))
    for pair in ((x, y), (x, y), (x[1:], y), (x[4:], y[8:])):
        direct.start(made, *pair)
    views = [[(part.dtype, part.data_ptr()) for part in call[1:4]] for call in kernel.through_triton]
    a, b, f, h = x.data_ptr(), y.data_ptr(), torch.float32, torch.bfloat16
    assert views == [[(h, b + 16), (f, a + 4 * 4), (h, b)], [(h, b + 16), (f, a + 5 * 4), (h, b)]]
    assert [call[9:12] for call in kernel.launched] == [(b + 16, a + 16, b), (b + 32, a + 32, b + 16)]
    odd = started(kernel, parts=((0, 1), (1, 0)))
    for _ in range(2):
        direct.start(odd, x, y)
    assert len(kernel.through_triton) == 4


def test_tuples_are_given_one_after_the_other(direct: LaunchContext) -> None:
    kernel, (a, b, c) = _Kernel(), tensors(torch.float32, torch.bfloat16, torch.float32)
    made = started(kernel, tuples=(2, 1))
    for _ in range(2):
        direct.start(made, a, b, c)
    direct.start(made, a, b[1:], c)
    assert [call[1:3] for call in kernel.through_triton[:1]] == [((a, b), (c,))]
    assert len(kernel.through_triton) == 2
    assert [call[9:11] for call in kernel.launched] == [((a.data_ptr(), b.data_ptr()), (c.data_ptr(),))]


def test_tuples_are_made_of_parts(direct: LaunchContext) -> None:
    kernel, (a, b) = _Kernel(), tensors(torch.float32, torch.bfloat16)
    made = started(kernel, tuples=(2, 1)).settled(((1, 8), (0, 0), (0, 4)))
    for _ in range(2):
        direct.start(made, a, b)
    given = [[t.data_ptr() for t in each] for each in kernel.through_triton[0][1:3]]
    x, y = a.data_ptr(), b.data_ptr()
    assert given == [[y + 16, x], [x + 16]]
    assert [call[9:11] for call in kernel.launched] == [((y + 16, x), (x + 16,))]


def test_a_settled_launch_has_a_form_for_each_order(direct: LaunchContext) -> None:
    """Its tensors' dtypes aren't looked at; it shares no form with what it was made of."""
    kernel, pair = _Kernel(), tensors(torch.float32, torch.int32)
    first = started(kernel, early=True)
    direct.start(first, *pair)
    made = first.settled()
    direct.start(made, *pair)
    direct.start(made, *tensors(torch.float32, torch.int32))
    assert len(kernel.through_triton) == 2
    direct.stream_waits(stream(1))
    direct.start(made, *pair)
    assert len(kernel.through_triton) == 3
    direct.start(made, pair[0][1:], pair[1])
    assert len(kernel.through_triton) == 4
    assert len(kernel.launched) == 1
    direct.start(first.settled(((1, 0), (0, 0))), *pair)
    assert len(kernel.through_triton) == 5
    kept = started(kernel, parts=((1, 8), (0, 4), (1, 0))).settled()
    assert kept.parts == ((1, 8), (0, 4), (1, 0))


def test_of_one_part_the_address_is_picked(direct: LaunchContext) -> None:
    kernel, (x, y) = _Kernel(), tensors(torch.float32, torch.bfloat16)
    made = Launch(kernel, (3, 2), (5, 6), SIDE=16, FLAG=True, parts=((1, 8),))
    for _ in range(2):
        direct.start(made, x, y)
    assert kernel.launched[0][9:] == (y.data_ptr() + 16, 5, 6, 16, True)


def test_a_boxed_tensor_is_launched_as_a_descriptor(direct: LaunchContext) -> None:
    """Checked by Triton's class the first time and where an address is odd, the same without a check else."""
    kernel, first, second = _Kernel(), tensors(torch.bfloat16, torch.float32), tensors(torch.bfloat16, torch.float32)
    made = started(kernel, boxes=(([4, 16], [16, 1], [2, 8]), None))
    for pair in (first, second):
        direct.start(made, *pair)
    due = TensorDescriptor(second[0].view(4, 16), [4, 16], [16, 1], [2, 8])
    (through,), (run,) = kernel.through_triton, kernel.launched
    assert isinstance(through[1], TensorDescriptor)
    assert through[1].base is first[0]
    assert through[2] is first[1]
    found, address = run[9:11]
    assert isinstance(found, TensorDescriptor)
    assert found.base is second[0]
    assert address == second[1].data_ptr()
    assert [getattr(found, name) for name in ("shape", "strides", "block_shape", "padding")] == [
        getattr(due, name) for name in ("shape", "strides", "block_shape", "padding")
    ]
    assert vars(found).keys() == vars(due).keys()
    with pytest.raises(AssertionError, match="aligned"):
        direct.start(made, first[0][1:], first[1])


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook", "pre_run_hooks"])
def test_hooks_are_told_of_launches_made_once(
    direct: LaunchContext, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    kernel, pair = _Kernel(), tensors(torch.float32, torch.int32)
    made = started(kernel)
    direct.start(made, *pair)
    if hook == "pre_run_hooks":
        kernel.pre_run_hooks.append(print)
    else:
        monkeypatch.setattr(launch.knobs.runtime, hook, lambda metadata: None)
    direct.start(made, *pair)
    assert len(kernel.through_triton) == 2
    assert not kernel.launched


class _Launcher:
    """Triton's, as of 3.6: a C function behind flags and scratch memory."""

    def __init__(self, scratch: int) -> None:
        self.global_scratch_size, self.profile_scratch_size = scratch, 0
        self.called: list[str] = []
        self.launch: Any = lambda *arguments: self.called.append("launch")

    def __call__(self, x: int, y: int, z: int, stream: int, function: object, *arguments: object) -> None:
        self.called.append("launcher")
        memory = "memory" if self.global_scratch_size else None
        self.launch(x, y, z, stream, function, False, True, memory, None, *arguments)


def test_a_kernel_without_scratch_memory_is_launched_by_the_c_function() -> None:
    before = ("function", (4, 1, 0), None, None, None)
    plain, scratch = _Launcher(0), _Launcher(8)
    run, first = launch._without_scratch(plain, before)
    assert (run, first) == (plain.launch, ("function", False, True, None, None, (4, 1, 0), None, None, None))
    assert launch._without_scratch(scratch, before) == (scratch, before)
    assert launch._without_scratch(print, before) == (print, before)
    plain.called.clear()
    run(1, 1, 1, 7, *first, 16)
    assert plain.called == ["launch"]


def test_the_device_is_current_within_and_the_former_one_after(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    with launch_context(torch.device("cuda:1")):
        assert current == [1]
    assert current == [0]
    with pytest.raises(KeyError), launch_context(torch.device("cuda:1")):
        raise KeyError
    assert current == [0]
    with launch_context(torch.device("cuda")) as context:
        assert current == [0]
        assert context.device == torch.device("cuda:0")
