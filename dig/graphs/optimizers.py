"""An optimizer whose step is inside of a CUDA graph: made fit for it, and watched from call to call.

What a graph reads where it lies can change between replays: parameters, moments, and the learning rate, which becomes a
tensor. Every other setting is a number that the graph's kernels were launched with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dig.graphs.recording import CaptureError
from dig.graphs.watch import storage_of

FIRST_VALUES = {"NAdam": {"mu_product": 1.0}}
"""What an optimizer's state begins with where that isn't zero."""
FROM_ZERO = ("Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
"""Optimizers of PyTorch's whose first step is the one from a state of `FIRST_VALUES`, else of zeros."""
_NOT_READ = ("params", "lr", "initial_lr")
_SCHEDULED = (
    "the step changes its optimizer's settings, as a learning rate's schedule does; call the schedule after the "
    "captured step, outside of it"
)


class GraphOptimizer:
    """An optimizer within a captured step.

    Args:
        optimizer: Changed in place: ``capturable`` is turned on where there is such an option, the count of steps moves
            to the GPU, and the learning rate becomes an fp32 tensor there, wherever the optimizer can read one.
        device: Where the graph will run.

    Raises:
        CaptureError: It can't be in a graph.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer = optimizer
        self.name = type(optimizer).__name__
        self._groups = optimizer.param_groups
        self._members = [list(group["params"]) for group in self._groups]
        self.parameters: list[Tensor] = [parameter for members in self._members for parameter in members]
        if wrong := [parameter for parameter in self.parameters if parameter.device.type != device.type]:
            raise CaptureError(
                f"{self.name} has parameters on {wrong[0].device}, the graph runs on {device}; move the model first, "
                "then make its optimizer"
            )
        self._undo: list[Callable[[], object]] = []
        self._states = {parameter: set(optimizer.state.get(parameter, ())) for parameter in self.parameters}
        self._rates = [self._prepare(group, device) for group in self._groups]
        self._settings = [_settings(group) for group in self._groups]
        self._counted: dict[tuple[int, str], Any] = {}

    def _prepare(self, group: dict[str, Any], device: torch.device) -> Tensor | None:
        """Make a group fit for a graph: its learning rate as a tensor, None where the optimizer can't read one."""
        before = dict(group)
        self._undo.append(partial(group.update, before))
        if "capturable" in group:
            group["capturable"] = True
        if not ("capturable" in group or group.get("fused")):
            return None
        for parameter in group["params"]:
            state = self.optimizer.state.get(parameter, {})
            step = state.get("step")
            if step is not None and not (isinstance(step, Tensor) and step.device == parameter.device):
                self._undo.append(partial(state.update, step=step))
                state["step"] = torch.as_tensor(step, dtype=torch.float32).to(parameter.device)
        rate = group["lr"]
        if not (isinstance(rate, Tensor) and rate.device.type == device.type and rate.dtype == torch.float32):
            group["lr"] = rate = torch.tensor(float(rate), dtype=torch.float32, device=device)
        return rate

    def tensors(self) -> list[Tensor]:
        """Parameters and the state that exists: what a step moves."""
        states = [self.optimizer.state[parameter] for parameter in self.parameters if parameter in self.optimizer.state]
        return self.parameters + [value for state in states for value in state.values() if isinstance(value, Tensor)]

    def after_first_run(self) -> set[int]:
        """Look at the state that the first run made: its storages, and those of gradients.

        Raises:
            CaptureError: Nobody knows how the state begins.
        """
        fresh = self._fresh()
        if fresh and self.name not in FROM_ZERO:
            raise CaptureError(
                f"how the state of {self.name} begins isn't known here; do one step without the graph before capturing"
            )
        if fresh and any(group.get("momentum") and group.get("dampening") for group in self._groups):
            raise CaptureError(
                f"{self.name}'s first step with dampening is unlike the others; do one step without the graph before "
                "capturing"
            )
        self._counted = self._countable()
        known = {storage_of(value) for _, _, value in fresh}
        return known | {storage_of(parameter.grad) for parameter in self.parameters if parameter.grad is not None}

    def after_second_run(self, written: set[int]) -> None:
        """Raise CaptureError where a run, which wrote these storages, moved what a replay wouldn't."""
        if any(rate is not None and storage_of(rate) in written for rate in self._rates):
            raise CaptureError(_SCHEDULED)
        for (index, key), value in self._countable().items():
            before = self._counted.get((index, key))
            if isinstance(value, Tensor) and value is not before:
                raise CaptureError(f"{self.name} replaces its state {key!r} at every step instead of writing to it")
            if not isinstance(value, Tensor) and value != before:
                raise CaptureError(f"{self.name} counts {key!r} in Python, where replays of a CUDA graph don't count")
        for group, rate, settings in zip(self._groups, self._rates, self._settings, strict=True):
            if (rate is not None and group["lr"] is not rate) or _settings(group, tuple(settings)) != settings:
                raise CaptureError(_SCHEDULED)

    def reset_fresh(self) -> None:
        """Let the state that warm-up made begin as a first step finds it."""
        first = FIRST_VALUES.get(self.name, {})
        for _, key, value in self._fresh():
            value.fill_(first.get(key, 0.0))

    def undo(self) -> None:
        """Make the optimizer what it was before it was prepared."""
        for parameter, keys in self._states.items():
            state = self.optimizer.state.get(parameter, {})
            for key in [key for key in state if key not in keys]:
                del state[key]
            if not state:
                self.optimizer.state.pop(parameter, None)
        for undo in reversed(self._undo):
            undo()

    def follow(self) -> None:
        """Take what was changed since the last call: a learning rate is filled in, anything else is refused.

        Raises:
            CaptureError: Another setting was changed, or the optimizer was loaded or given parameters.
        """
        groups = self.optimizer.param_groups
        if groups is not self._groups or len(groups) != len(self._rates):
            raise CaptureError(
                f"{self.name} was loaded or given parameters after the capture, so the graph moves what it had before; "
                "load first, then capture"
            )
        for group, rate, settings in zip(groups, self._rates, self._settings, strict=True):
            for key, value in settings.items():
                if group[key] != value:
                    advice = "make it with fused=True, which reads it from the GPU" if key == "lr" else "capture again"
                    raise CaptureError(
                        f"{key} of {self.name} is {group[key]} now and was {value} at the capture, which the graph "
                        f"keeps; {advice}"
                    )
            asked = group["lr"]
            if rate is not None and asked is not rate:
                rate.copy_(asked) if isinstance(asked, Tensor) else rate.fill_(asked)
                group["lr"] = rate

    def _fresh(self) -> list[tuple[Tensor, str, Tensor]]:
        """(parameter, key, tensor) of the state that wasn't there before."""
        return [
            (parameter, key, value)
            for parameter, keys in self._states.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if key not in keys and isinstance(value, Tensor)
        ]

    def _countable(self) -> dict[tuple[int, str], Any]:
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        return {(index, key): value for index, state in enumerate(states) for key, value in state.items()}


def _settings(group: dict[str, Any], keys: Sequence[str] | None = None) -> dict[str, Any]:
    """The numbers of a group that a graph's kernels are launched with."""
    chosen = [key for key in group if key not in _NOT_READ] if keys is None else keys
    found = {key: group[key] for key in chosen if not isinstance(group[key], Tensor)}
    if not isinstance(group["lr"], Tensor):
        found["lr"] = group["lr"]
    return found


def as_optimizers(optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None) -> list[Any]:
    """None, one or several as a list."""
    if optimizer is None:
        return []
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)


def prepare_scaler(scaler: torch.amp.GradScaler, optimizers: Sequence[GraphOptimizer], device: torch.device) -> None:
    """Let a `GradScaler` make its state, which a graph then finds in place.

    Raises:
        CaptureError: An optimizer leaves it to the scaler to skip a step, who would ask the GPU whether to.
    """
    if not scaler.is_enabled():
        return
    for prepared in optimizers:
        if not getattr(prepared.optimizer, "_step_supports_amp_scaling", False):
            raise CaptureError(
                f"GradScaler asks the GPU before every step of this {prepared.name} whether a gradient overflowed; "
                "make the optimizer with fused=True, which skips the step on the GPU itself"
            )
    scaler.scale(torch.zeros((), device=device))
