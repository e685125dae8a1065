"""Whether a run may begin or go on in a folder: that what lies there is of this run, and that there is room."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dig.family import FamilyError, UnknownModelError
from dig.fields import INTEGERS
from dig.memory import check_disk
from dig.messages import describe
from dig.training.config import TrainConfig
from dig.training.saving import FOLDER, Checkpoint, CheckpointError, checkpoint_files, newest_checkpoint, step_of

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
_COUNTS = ("step", "pending", "pending_timed")
_DURATIONS = ("seconds", "pending_seconds")
"""What a checkpoint says of its moment."""


def recorded_config(folder: Path) -> TrainConfig | None:
    """The run that a folder was begun with; None where no run was.

    Raises:
        ValueError: Its record is damaged.
        FamilyError: Its model's family cannot be had here.
    """
    content = _read_config(folder)
    return None if content is None else content[0]


def steps_behind(folder: Path) -> int:
    """Steps of a run's newest whole checkpoint; 0 where there is none."""
    path = newest_checkpoint(folder / FOLDER)
    return 0 if path is None else step_of(path)


def _read_config(folder: Path) -> tuple[TrainConfig, dict[str, Any]] | None:
    """The run of a folder, and the environment that it was begun in."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        environment = content.get("environment", {})
        if not isinstance(environment, dict):
            raise TypeError("environment must be an object")
        return TrainConfig.from_json(content["config"]), environment
    except (FamilyError, UnknownModelError) as error:
        raise no_family(path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({describe(error)}); restore it, or choose another folder") from None


def no_family(path: Path, error: FamilyError | UnknownModelError) -> FamilyError:
    """What to say of a run whose model is of somebody's package that is not there; ``path`` records the run."""
    remedy = "" if isinstance(error, FamilyError) else "; is the package that declares it installed?"
    return FamilyError(f"the model of {path} cannot be had here: {describe(error)}{remedy}")


def check_folder(config: TrainConfig, folder: Path, environment: Mapping[str, Any], *, elsewhere: bool = False) -> None:
    """Raise ValueError if a folder is another run's; warn if it was begun with other versions, or elsewhere.

    Args:
        config: The run.
        folder: Its own, perhaps.
        environment: Where it runs now.
        elsewhere: Whether it may go on on another device, backend or execution.
    """
    any_checkpoint = any(folder.glob(f"{FOLDER}/step-*"))
    content = _read_config(folder)
    if content is None:
        if any_checkpoint:
            raise ValueError(f"{folder} holds checkpoints but no {CONFIG_NAME}; choose another folder")
        return
    theirs, before = content
    if differences := config.differences(theirs, elsewhere=elsewhere):
        if not any_checkpoint:
            return  # A run that came to no checkpoint leaves nothing to go on with, and doesn't block the next one.
        words = f"({'; '.join(differences[:5])}: asked for, there)"
        if elsewhere:
            raise ValueError(
                f"{folder} can't go on with other options that its weights depend on {words}: leave them out, or begin "
                f"another run, with --config {folder}/config.toml --out ANOTHER"
            )
        move = "" if config.differences(theirs, elsewhere=True) else f"; --resume {folder} goes on with it here too"
        raise ValueError(
            f"{folder} holds another run {words}; repeat its options to go on with it, or choose another folder{move}"
        )
    if any_checkpoint and (moves := config.moves(theirs)):
        logger.warning(
            "%s goes on with another %s: from here on not bit for bit as it would have there", folder, ", ".join(moves)
        )
    changed = [name for name in ("torch", "triton", "gpu_name") if before.get(name) != environment.get(name)]
    if changed:
        logger.warning(
            "%s was begun with another %s; results may differ in their last bits from here on",
            folder,
            " and ".join(f"{name} ({before.get(name)}, now {environment.get(name)})" for name in changed),
        )


def check_same_run(config: TrainConfig, checkpoint: Path, about: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` unless a checkpoint says of itself that it is of this run, wherever it ran.

    Args:
        config: The run.
        checkpoint: Its file, whose name has the step.
        about: What it says.
    """
    try:
        theirs = TrainConfig.from_json(about["config"])
        for name in (*_COUNTS, *_DURATIONS):
            number = about[name]
            known = isinstance(number, int if name in _COUNTS else int | float) and not isinstance(number, bool)
            if not known or not 0 <= number < INTEGERS:
                raise ValueError(f"{name} is {str(number)[:60]}")
    except (FamilyError, UnknownModelError) as error:
        raise no_family(checkpoint, error) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint} describes no run that this version knows: {describe(error)}") from None
    differences = config.differences(theirs, elsewhere=True)
    if about["step"] != step_of(checkpoint):
        differences.append(f"step: {step_of(checkpoint)} by its name, {about['step']}")
    if differences:
        raise CheckpointError(
            f"{checkpoint} is of another run ({'; '.join(differences[:5])}: this run, there); put this run's "
            "checkpoints back, or choose another folder"
        )


def check_state(checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` unless a checkpoint's tensors are, by name, type and shape, those of a state."""
    wrong = sorted(state.keys() ^ checkpoint.tensors.keys())
    for name in state.keys() & checkpoint.tensors.keys():
        ours, theirs = state[name], checkpoint.tensors[name]
        if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
            wrong.append(name)
    if wrong:
        raise CheckpointError(f"{checkpoint.path} is of another model or version: {', '.join(wrong[:3])} do not fit")


def check_room(config: TrainConfig, folder: Path, step: int, state: Mapping[str, Tensor]) -> None:
    """Raise `dig.memory.TooLargeError` unless there is room for the checkpoints after ``step``, which hold a state."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    there, to_come = len(checkpoint_files(folder / FOLDER)), -(-max(0, config.steps - step) // config.save_every)
    # One more than are kept: the new one is whole before an old one goes.
    most = min(config.keep + 1, there + to_come)
    check_disk(folder / FOLDER, size * max(0, most - there), "the checkpoints", "free some, or lower --keep")
