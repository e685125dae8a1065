"""One line that turns a step, of training or of inference, into a CUDA graph with static inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map_only

from dig.graphs.inputs import StaticInputs
from dig.graphs.optimizers import GraphOptimizer, as_optimizers, prepare_scaler
from dig.graphs.recording import CaptureError, on_capture_stream, record
from dig.graphs.watch import Journal, Watch, storage_of

T = TypeVar("T")

WARMUP = 3
"""Runs before a capture, so that every kernel is compiled and every buffer there.

Two are watched, and run as they are written; the others let torch.compile do its work.
"""


class Captured(Generic[T]):
    """A step as a CUDA graph. Made by `capture`.

    Attributes:
        outputs: What the step returns: tensors that each replay overwrites.
        draws: Whether the step draws random numbers on the GPU.
    """

    def __init__(
        self,
        step: Callable[..., T],
        inputs: tuple[Any, ...],
        *,
        device: torch.device,
        optimizers: Sequence[torch.optim.Optimizer] = (),
        scaler: torch.amp.GradScaler | None = None,
        generators: Sequence[torch.Generator] = (),
        warmup: int = WARMUP,
        warm_up: Callable[..., object] | None = None,
        moves: Sequence[Tensor] | None = None,
        recorder: Callable[..., tuple[Any, T]] = record,
    ) -> None:
        self._step = step  # holds the model, whose memory the graph reads
        self._device = device
        self._generators = list(generators)
        self._moves = moves
        self._optimizers: list[GraphOptimizer] = []
        self._kept: list[Tensor] = []
        self.draws = False
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        try:
            for optimizer in optimizers:
                self._optimizers.append(GraphOptimizer(optimizer, device))
            if scaler is not None:
                prepare_scaler(scaler, self._optimizers, device)
            self._static = StaticInputs(inputs, device)
            with _only(optimizers):
                written = self._warm_up(warm_up or step, warmup)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    _leave(parameter, gradient, written)
                self._graph, self.outputs = recorder(self._run, device=device, generators=self._generators)
        except BaseException:
            for prepared in reversed(self._optimizers):
                prepared.undo()
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            if scaler is not None:
                # How far each optimizer had come in its step.
                scaler._per_optimizer_states.clear()
            raise
        self._replay: Callable[[], None] = self._graph.replay

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The tensors that the graph reads, nested as the arguments; one of them given at a call isn't copied."""
        return self._static.tree

    def __call__(self, *inputs: Any) -> T:
        """Do the step on other inputs: the tensors of `outputs`, overwritten by the next call; ``clone()`` keeps one.

        Args:
            *inputs: Of the shapes, dtypes and nesting of the capture, on the GPU or the CPU. From pinned memory they
                are copied while the host goes on: don't overwrite it before the GPU is done.

        Raises:
            CaptureError: They don't fit, or an optimizer was changed in what the graph holds fast; the step isn't done.
        """
        self._static.fill(inputs)
        for prepared in self._optimizers:
            prepared.follow()
        self._replay()
        return self.outputs

    def _run(self) -> T:
        """The step on its static inputs; what it returns lets go of autograd's graph, and the activations in it."""
        return cast(T, tree_map_only(Tensor, lambda tensor: tensor.detach(), self._step(*self._static.tree)))

    def _warm_up(self, run: Callable[..., object], times: int) -> set[int]:
        """Run the step, and put back what that moved, but for gradients; the storages that a run wrote into."""
        journal = Journal()
        moved = self._moves
        if moved is None:
            moved = [tensor for prepared in self._optimizers for tensor in prepared.tensors()]
        for tensor in moved:
            journal.note(tensor)
        watch: Watch | None = None
        random = _Random(self._device, self._generators)
        try:
            with on_capture_stream(self._device), warnings.catch_warnings():
                # An optimizer remarks that it is made for graphs and runs without one: here it should.
                warnings.filterwarnings("ignore", message=".*capturable=True.*")
                if self._moves is None:
                    watch = self._watched(run, journal)
                for _ in range(times if watch is None else times - 2):
                    self._once(run)
        finally:
            self.draws = random.drawn_on_device()
            random.restore()
            journal.restore()
        with torch.no_grad():
            for prepared in self._optimizers:
                prepared.reset_fresh()
        if watch is None:
            return set()
        # A name that a script gives to another model later would else be all that held this one's weights.
        self._kept = list(watch.read.values())
        return watch.written

    def _once(self, run: Callable[..., object]) -> None:
        run(*self._static.tree)
        self._static.drop_gradients()

    def _watched(self, run: Callable[..., object], journal: Journal) -> Watch:
        """Two runs under watch, the second of which is judged.

        As they are written: torch.compile would not only leave them alone, but never look at their code again.
        """
        with torch.compiler.set_stance("force_eager"):
            return self._watched_eagerly(run, journal)

    def _watched_eagerly(self, run: Callable[..., object], journal: Journal) -> Watch:
        first = Watch(self._device, journal, generators=self._generators)
        with first:
            self._once(run)
        known: set[int] = set()
        for prepared in self._optimizers:
            known |= prepared.after_first_run() & first.made
        second = Watch(self._device, journal, generators=self._generators, known=known, earlier=first)
        with second:
            self._once(run)
        for prepared in self._optimizers:
            prepared.after_second_run(second.written)
        return second


def capture(
    step: Callable[..., T],
    *inputs: Any,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    generators: Sequence[torch.Generator] = (),
    warmup: int = WARMUP,
    warm_up: Callable[..., object] | None = None,
    moves: Sequence[Tensor] | None = None,
) -> Captured[T]:
    """Turn a step into a CUDA graph, which is launched at once instead of kernel by kernel.

    Call what it returns like the step. Capturing changes nothing: the step runs a few times first, and weights,
    buffers, averages, the optimizer's state, the scaler and random numbers are put back, so the first call does the
    first step. Only what the step does in Python, and kernels that are launched past PyTorch's dispatcher, can't be
    seen.

    Args:
        step: A function of tensors: forward pass, or forward, backward, clipping, optimizer, averages. Its launches
            are repeated, its Python isn't: numbers are constants, and a print happens at the capture. Weights must stay
            where they are: ``load_state_dict`` of a model is right, ``.to()`` and new parameters are not.
        *inputs: Example arguments, tensors nested in tuples, lists or dictionaries; copied.
        optimizer: Of the step, one or several. It is made capturable, its learning rate an fp32 tensor. A number
            written to ``param_groups[i]["lr"]`` between calls, and schedulers of PyTorch's, take effect; a changed
            setting of another kind is refused.
        scaler: `torch.amp.GradScaler` of the step, for fp16; the optimizer must be fused. Its ``update`` may be in the
            step.
        generators: Generators on the GPU that the step draws from, beside the default one. Each call draws anew, and
            follows ``torch.manual_seed``.
        warmup: Runs before the capture, at least 3.
        warm_up: What is run instead of the step then, with the same inputs: a part of it that takes less time, and does
            and keeps nothing else.
        moves: Every tensor that the step moves, the optimizer's too, of which the state must exist. Then it isn't
            watched, and what a graph would repeat wrongly isn't refused: for one that writes into what its earlier runs
            made, and in full before it reads that, as a model that FSDP gathers does.

    Returns:
        The captured step. Gradients are its own memory: read them after a call, don't set them.

    Raises:
        CaptureError: There is no GPU, or the step can't be captured; the message says what to change. Everything is
            then as before, and the process can go on without a graph.
    """
    if warmup < WARMUP:
        raise ValueError(f"warmup must be at least {WARMUP}; got {warmup}")
    if not torch.cuda.is_available():
        raise CaptureError(
            "a CUDA graph needs an NVIDIA GPU, and torch sees none; on a CPU call the step itself, which is what a "
            "graph would repeat"
        )
    if torch.cuda.is_current_stream_capturing():
        raise CaptureError("a capture is under way on this stream; capture one step after the other")
    optimizers = as_optimizers(optimizer)
    device = _device_of(inputs, optimizers)
    if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
        raise CaptureError(
            "autocast is on around the capture, so the graph would keep weights as they were cast before it; enter "
            "autocast within the step"
        )
    return Captured(
        step,
        inputs,
        device=device,
        optimizers=optimizers,
        scaler=scaler,
        generators=generators,
        warmup=warmup,
        warm_up=warm_up,
        moves=moves,
    )


class _Random:
    """The states of the generators that a step may draw from, as they are now."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        default = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
        self._of_device = [default, *generators]
        self._host = torch.get_rng_state()
        self._states = [generator.get_state() for generator in self._of_device]

    def drawn_on_device(self) -> bool:
        """Whether anything has been drawn on the GPU since."""
        states = zip(self._of_device, self._states, strict=True)
        return any(not torch.equal(generator.get_state(), state) for generator, state in states)

    def restore(self) -> None:
        """Let everything be drawn again."""
        torch.set_rng_state(self._host)
        for generator, state in zip(self._of_device, self._states, strict=True):
            generator.set_state(state)


def _leave(parameter: Tensor, before: Tensor | None, written: set[int]) -> None:
    """Leave a gradient as the capture must find it.

    One that the step makes anew (``zero_grad()``) goes, and the graph has its memory to itself. One that a run wrote
    into stays, because the graph will: it is zeroed in place, or added to from call to call.
    """
    gradient = parameter.grad
    if gradient is None or gradient is before:
        return
    if written and storage_of(gradient) in written:
        gradient.zero_()
    else:
        parameter.grad = None


@contextmanager
def _only(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[None]:
    """Refuse steps of other optimizers."""

    def check(optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if all(optimizer is not given for given in optimizers):
            raise CaptureError(
                f"the step moves an optimizer that capture wasn't given, {type(optimizer).__name__}; pass optimizer="
            )

    handle = register_optimizer_step_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _device_of(inputs: tuple[Any, ...], optimizers: Sequence[torch.optim.Optimizer]) -> torch.device:
    """The one GPU of inputs and parameters; the current one where neither is on any."""
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    leaves += [
        parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
    ]
    devices = {leaf.device for leaf in leaves if leaf.device.type == "cuda"}
    if len(devices) > 1:
        raise CaptureError(f"the inputs are on {', '.join(sorted(map(str, devices)))}; a CUDA graph is on one GPU")
    return devices.pop() if devices else torch.device("cuda", torch.cuda.current_device())
