"""After the timed steps: what was timed, run once more on other inputs, against the same step run eagerly.

It finds a kernel that stops writing after some calls, an output kept from earlier inputs, and a graph that reads memory
which is another tensor's by now. All of them are fast, and were right before the clock started.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases.case import Case
from bench.measure.steps import Step, capture_stream
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


def recheck(case: Case, step: Step, run: Callable[[], Tensor]) -> float | None:
    """Run what was timed on other inputs, and compare.

    Args:
        case: What was timed.
        step: Of that case; its inputs are overwritten.
        run: One timed step; gives its result.

    Returns:
        The relative error of the output, or of the loss; None where the model draws random numbers that decide on it,
        and its compiled form draws others.

    Raises:
        ParityError: They differ, or weights are mostly zeros by now.
        torch.OutOfMemoryError: The eager step does not fit beside what was timed.
    """
    refuse_zeros(step.model.named_parameters())
    values, _ = make_inputs(step.model, case.batch, seed=SEED + 1)
    # Dropping a label that is null already changes nothing: few models draw anything else.
    values[3].fill_(step.model.null_label)
    step.give(values)
    with capture_stream(case.device):
        return _forward(case, step, run) if step.loss is None else _training(case, step, run)


@contextlib.contextmanager
def _eagerly(case: Case) -> Any:
    """Compiled parts run as they are written."""
    with torch.compiler.set_stance("force_eager") if case.compiles else contextlib.nullcontext():
        yield


def _refuse(what: str, error: float) -> None:
    raise ParityError(
        f"after the timed steps, on other inputs, its {what} differs from its eager step's by {error:.2g}"
    )


def _forward(case: Case, step: Step, run: Callable[[], Tensor]) -> float:
    with _eagerly(case):
        expected = step.run().float().clone()
    output = run().float()
    error = relative_error(output, expected)
    if not error <= (COMPILED_BOUND[case.dtype] if case.compiles else REPLAY_ERROR):
        _refuse("output", error)
    rows, columns = step.model.grid
    if rows * columns <= REFERENCE_TOKENS:
        x, _, t, y = step.tensors
        check_output_of(case, step.model, (x, t, y), output)
    return error


def _training(case: Case, step: Step, run: Callable[[], Tensor]) -> float | None:
    """Compare the loss and every parameter's gradient, read from AdamW's first moment: m' = 0.9 m + 0.1 g."""
    assert step.loss is not None
    assert step.optimizer is not None
    (group,) = step.optimizer.param_groups
    parameters = list(group["params"])
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
