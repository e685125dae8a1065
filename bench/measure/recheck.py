"""After the timed steps: what was timed, run once more on other inputs, against the same step run eagerly.

It finds a kernel that stops writing after some calls, an output kept from earlier inputs, and a graph that reads memory
which is another tensor's by now. All of them are fast, and were right before the clock started.

The eager step runs the same kernels, so it is held against itself too: against what it gave on these inputs at first
(`look_before`), and of a forward pass against what it gives on those of the timed steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cases.case import Case
from bench.measure.steps import Step, build_model, capture_stream
from bench.parity.error import ParityError, relative_error
from bench.parity.inputs import SEED, make_inputs, refuse_zeros
from bench.parity.reference import GRADIENT_FLOOR, MOST_OFF, check_output_of
from bench.parity.replay import REPLAY_ERROR

COMPILED_BOUND = {"bf16": 5e-2, "fp32": 2e-3}
"""Largest relative error of a compiled step: Inductor's fused loops round less often than eager kernels."""
ROUNDING = 1e-4
"""Share of AdamW's first moment: a gradient below it is hidden by the moment's rounding."""
REFERENCE_TOKENS = 1024
"""Most tokens an image of a forward pass that is compared with its reference too: of more, some take minutes."""


@dataclass(frozen=True, kw_only=True)
class Before:
    """What the eager step gave on the inputs of the check after it, before any step was timed.

    Attributes:
        result: The output, or the loss; fp32, on the host.
        gradients: Of a training step's parameters: the norm, and the sum with alternating signs; None where there is
            none.
    """

    result: Tensor
    gradients: tuple[tuple[float, float] | None, ...] = ()


@contextlib.contextmanager
def _other_inputs(case: Case, step: Step) -> Iterator[None]:
    """The step reads other inputs within; random numbers are those of a seed, and outside go on as they were."""
    kept = [tensor.clone() for tensor in step.tensors]
    values, _ = make_inputs(step.model, case.batch, seed=SEED + 1)
    # Dropping a label that is null already changes nothing: few models draw anything else.
    values[3].fill_(step.model.null_label)
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if case.device == "cuda" else []):
        torch.manual_seed(SEED)
        step.give(values)
        try:
            yield
        finally:
            for tensor, value in zip(step.tensors, kept, strict=True):
                tensor.copy_(value)


def look_before(case: Case, step: Step) -> Before | None:
    """What the eager step gives on the inputs of the check after it; None where there is no memory for it.

    To be called before any step: what stops after some calls, or keeps its first output, is right at first.
    """
    try:
        with capture_stream(case.device), _other_inputs(case, step), _eagerly(case):
            if step.loss is None:
                return Before(result=step.run().float().cpu())
            loss, gradients = _gradients(step)
            return Before(result=loss.float().cpu(), gradients=tuple(map(_summary, gradients)))
    except torch.OutOfMemoryError:
        return None


def recheck(case: Case, step: Step, run: Callable[[], Tensor], before: Before | None = None) -> float | None:
    """Run what was timed on other inputs, and compare.

    Args:
        case: What was timed.
        step: Of that case; of a training step the weights are then those that it began with.
        run: One timed step; gives its result.
        before: What `look_before` gave; without, the eager step is not held against itself.

    Returns:
        The relative error of the output, or of the loss; None where the model draws random numbers that decide on it,
        and its compiled form draws others.

    Raises:
        ParityError: They differ, or weights are mostly zeros by now.
        torch.OutOfMemoryError: The eager step does not fit beside what was timed.
    """
    refuse_zeros(step.model.named_parameters())
    with capture_stream(case.device):
        with _other_inputs(case, step):
            if step.loss is not None:
                error = _training(case, step, run)
                if before is not None and error is not None:
                    _as_before(case, step, before)
                return error
            error, output = _forward(case, step, run, before)
        if before is not None and torch.equal(run().float(), output):
            raise ParityError("after the timed steps, its output on their inputs is that on other inputs")
    return error


def _as_before(case: Case, step: Step, before: Before) -> None:
    """Hold the eager training step against what it gave at first, from the weights of then, which are drawn again.

    Raises:
        ParityError: Its loss, or gradients of more parameters than may be off, are others.
    """
    first = build_model(case)
    with torch.no_grad():
        for parameter, weight in zip(_parameters(step), first.parameters(), strict=True):
            parameter.copy_(weight)
    del first
    torch.manual_seed(SEED)
    with _eagerly(case):
        loss, gradients = _gradients(step)
    error = relative_error(loss.float().cpu(), before.result)
    bound = COMPILED_BOUND[case.dtype]
    if not error <= bound:
        raise ParityError(
            f"after the timed steps its loss is {error:.2g} off what it was on the same inputs before them"
        )
    off = 0
    for then, now in zip(before.gradients, map(_summary, gradients), strict=True):
        if then is None or now is None:
            off += then is not now
            continue
        near = bound * max(then[0], 1e-30)
        # A sum with signs is of the norm's size where the gradient is of numbers that know nothing of each other.
        off += not (abs(now[0] - then[0]) <= near and abs(now[1] - then[1]) <= 2 * near)
    if off > MOST_OFF * len(before.gradients):
        raise ParityError(
            f"after the timed steps, gradients of {off} of {len(before.gradients)} parameters are not what they were "
            "on the same inputs before them"
        )


def _parameters(step: Step) -> list[Tensor]:
    assert step.optimizer is not None
    (group,) = step.optimizer.param_groups
    return list(group["params"])


def _gradients(step: Step) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The loss, and its gradient for each parameter."""
    assert step.loss is not None
    loss = step.loss()
    return loss.detach(), torch.autograd.grad(loss, _parameters(step), allow_unused=True)


def _summary(gradient: Tensor | None) -> tuple[float, float] | None:
    if gradient is None:
        return None
    flat = gradient.detach().float().flatten()
    return float(flat.norm()), float(flat[::2].sum() - flat[1::2].sum())


@contextlib.contextmanager
def _eagerly(case: Case) -> Any:
    """Compiled parts run as they are written."""
    with torch.compiler.set_stance("force_eager") if case.compiles else contextlib.nullcontext():
        yield


def _refuse(what: str, error: float) -> None:
    raise ParityError(
        f"after the timed steps, on other inputs, its {what} differs from its eager step's by {error:.2g}"
    )


def _forward(case: Case, step: Step, run: Callable[[], Tensor], before: Before | None) -> tuple[float, Tensor]:
    """The relative error, and the output."""
    with _eagerly(case):
        expected = step.run().float().clone()
    output = run().float().clone()
    error = relative_error(output, expected)
    if not error <= (COMPILED_BOUND[case.dtype] if case.compiles else REPLAY_ERROR):
        _refuse("output", error)
    if before is not None:
        changed = relative_error(expected.cpu(), before.result)
        if not changed <= COMPILED_BOUND[case.dtype]:
            raise ParityError(
                f"after the timed steps its output is {changed:.2g} off what it was on the same inputs before them"
            )
    rows, columns = step.model.grid
    if rows * columns <= REFERENCE_TOKENS:
        x, _, t, y = step.tensors
        check_output_of(case, step.model, (x, t, y), output)
    return error, output


def _training(case: Case, step: Step, run: Callable[[], Tensor]) -> float | None:
    """Compare the loss and every parameter's gradient, read from AdamW's first moment: m' = 0.9 m + 0.1 g."""
    assert step.loss is not None
    assert step.optimizer is not None
    (group,) = step.optimizer.param_groups
    parameters = _parameters(step)
    states = [step.optimizer.state[parameter] for parameter in parameters]
    torch.manual_seed(SEED)
    with _eagerly(case):
        loss = step.loss()
        again = step.loss().detach() if case.compiles else loss.detach()
        if not torch.equal(again, loss.detach()):
            return None
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, allow_unused=True)
    before = [
        (state["exp_avg"].clone(), parameter.detach().clone())
        for state, parameter in zip(states, parameters, strict=True)
    ]
    expected = loss.detach().float().clone()
    del loss
    torch.manual_seed(SEED)
    error = relative_error(run().float(), expected)
    if not error <= (COMPILED_BOUND[case.dtype] if case.compiles else REPLAY_ERROR):
        _refuse("loss", error)
    decay = group["betas"][0]
    bound = GRADIENT_FLOOR[case.dtype] if case.compiles else 2 * REPLAY_ERROR
    off = 0
    for parameter, state, gradient, (moment, value) in zip(parameters, states, gradients, before, strict=True):
        if gradient is None:
            continue
        applied = (state["exp_avg"] - decay * moment) / (1 - decay)
        stuck = bool(state["exp_avg"].any()) and torch.equal(parameter.detach(), value)
        # A branch that was dropped has no gradient; what is left of it then is the rounding of the moment.
        size = torch.maximum(gradient.norm(), ROUNDING * moment.norm()).clamp_min(1e-30)
        off += stuck or not ((applied - gradient).norm() / size).item() <= bound
    if off > MOST_OFF * len(parameters):
        raise ParityError(
            f"after the timed steps, on other inputs, {off} of {len(parameters)} parameters were not moved by the "
            "gradient of its eager step"
        )
    return error
