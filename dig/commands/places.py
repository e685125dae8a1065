"""Where a run runs: device, backend and execution, chosen for a new one, kept or moved for one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import typer

from dig.commands.common import choose_device, one_device
from dig.commands.run_options import given, model_text
from dig.family import BACKEND
from dig.packages import MissingPackageError
from dig.registry import parse_model
from dig.spec import ModelSpec

if TYPE_CHECKING:
    from dig.training.config import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run runs.

    Attributes:
        device: ``cuda`` or ``cpu``.
        name: The model's.
        options: Its options, the backend among them.
        source: Import path of its family, where it was named by that.
        asked: What the three options would ask for another time.
    """

    device: str
    name: str
    options: Mapping[str, str]
    source: str
    asked: Mapping[str, str]


def find_place(
    context: typer.Context, *, model: str, device: str, execution: str, going_on: TrainConfig | None
) -> Place:
    """Choose device, backend and execution.

    Args:
        context: Says which of the options stand on the command line: those are kept to.
        model: As asked for.
        device: Likewise.
        execution: Likewise.
        going_on: The run that goes on; where its device is not here, it moves to what is.

    Raises:
        ValueError: No such model or device.
        MissingPackageError: The package of a backend is not installed.
    """
    if going_on is not None and not given(context, "device"):
        device = going_on.device
        try:
            choose_device(device)
        except ValueError:
            device = "auto"
    where = one_device(device)
    moved = going_on is not None and where != going_on.device
    if moved and not given(context, "execution"):
        execution = "auto"
    try:
        name, options, source = parse_model(model, where)
    except (ValueError, MissingPackageError):
        if going_on is None or not moved or given(context, "model"):
            raise
        # The same weights on the backend for this device.
        model = model_text(_without_backend(going_on.model), where)
        name, options, source = parse_model(model, where)
    asked = {"model": model, "device": device, "execution": execution}
    return Place(device=where, name=name, options=options, source=source, asked=asked)


def _without_backend(spec: ModelSpec) -> ModelSpec:
    return replace(spec, options={name: value for name, value in spec.options.items() if name != BACKEND})
