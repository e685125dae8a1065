"""First weights of a run from a checkpoint: fitted to other classes and another resolution.

Shapes: K classes, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from dig.layers import Backbone, LabelEmbedder
from dig.registry import parse_name
from dig.sampling.anatomy import check_fit
from dig.sampling.published import file_kind
from dig.sampling.weights import Published, Weights, load_weights
from dig.spec import ModelSpec
from dig.training.saving import CheckpointError, read_about

POSITIONS = "pos_embed"
"""What every backbone here calls its embedding of positions: a buffer where it is fixed, a parameter where learned."""


@dataclass(frozen=True, kw_only=True)
class FirstWeights:
    """What a run begins with.

    Attributes:
        state: The model's state dict.
        sha256: Of the file that they are from.
        notes: What was changed to make them fit, a sentence each.
        new_labels: Whether a row of the label table is not from the file, and has to be learned.
    """

    state: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...] = ()
    new_labels: bool = False


def read_weights(path: Path, *, device: str, model: str | None) -> Weights:
    """Any weights that `dig.sampling.weights.load_weights` reads: of a run the averaged ones.

    Args:
        path: A run's folder, its checkpoint, or a published file.
        device: Where they will run.
        model: Name of the model of a file that doesn't say it itself.

    Raises:
        CheckpointError: There are none, or they can't be used.
    """
    try:
        return load_weights(path, device=device)
    except CheckpointError:
        says_itself = path.is_dir() or not path.is_file() or (file_kind(path) == "safetensors" and read_about(path))
        if model is None or says_itself:
            raise
    return load_weights(path, device=device, published=Published(model=model))


def fit_weights(found: Weights, spec: ModelSpec, class_names: Sequence[str], *, seed: int) -> FirstWeights:
    """Make weights those of a model of the same architecture, with other classes or another input size perhaps.

    Args:
        found: The weights.
        spec: The model.
        class_names: Its classes, in the order of its labels.
        seed: Of the rows of the label table that are new.

    Raises:
        CheckpointError: They are another architecture's.
    """
    torch.manual_seed(seed)
    model = spec.build()
    state, notes, new_labels = dict(found.state), [], False
    for name in _label_tables(model):
        if name in state:
            table, note, new_labels = _fit_labels(
                state[name], model.state_dict()[name], found.class_names, tuple(class_names)
            )
            state[name] = table
            notes += [note] if note else []
    before = found.spec.input_size if parse_name(found.spec.name)[2] == model.patch_size else None
    notes += _fit_positions(state, model, before)
    check_fit(state, model, spec, found.path)
    return FirstWeights(state=state, sha256=found.sha256, notes=tuple(notes), new_labels=new_labels)


def label_embedders(model: Backbone) -> list[str]:
    """Names of the modules that embed labels."""
    return [name for name, module in model.named_modules() if isinstance(module, LabelEmbedder)]


def _label_tables(model: Backbone) -> list[str]:
    return [f"{name}.embedding_table.weight" for name in label_embedders(model)]


def _fit_labels(
    old: Tensor, fresh: Tensor, names_before: tuple[str, ...], names: tuple[str, ...]
) -> tuple[Tensor, str, bool]:
    """A label table (K + 1, D) for other classes: rows of classes that both have, and the last, of no class, are kept.

    Where the file doesn't name its classes, they are taken for the same if they are as many.

    Returns:
        The table, what was done in words, and whether rows are new.
    """
    if old.ndim != 2 or old.shape[1:] != fresh.shape[1:] or len(old) < 2:
        return old, "", False  # Another architecture's, which is told as a whole.
    count = len(old) - 1
    known = names_before if len(names_before) == count else ()
    if known == names or (not known and count == len(names)):
        return old, "", False
    table = fresh.clone().to(old.dtype)
    table[-1] = old[-1]
    index = {name: row for row, name in enumerate(known)}
    kept = [name for name in names if name in index]
    for row, name in enumerate(names):
        if name in index:
            table[row] = old[index[name]]
    new = len(names) - len(kept)
    why = "" if known else ", for the file doesn't name its classes"
    note = (
        f"label table: {count} classes to {len(names)}: {len(kept)} of the same name kept, {new} new{why}; "
        "the row of no class is kept, as the last"
    )
    return table, note, new > 0


def _fit_positions(state: dict[str, Tensor], model: Backbone, input_size: tuple[int, int] | None) -> list[str]:
    """Make the embedding of positions, (1, T, D), one of the model's grid; says what was done."""
    old, fresh = state.get(POSITIONS), model.state_dict().get(POSITIONS)
    if old is None or fresh is None or old.ndim != 3 or old.shape[2] != fresh.shape[2]:
        return []
    rows, columns = model.grid
    extra = fresh.shape[1] - rows * columns  # tokens beside the grid's, which come first
    patch = model.patch_size
    if input_size is not None and math.prod(side // patch for side in input_size) == old.shape[1] - extra:
        before = (input_size[0] // patch, input_size[1] // patch)
    else:  # A file that doesn't say it: square, as all published ones are.
        side = math.isqrt(max(0, old.shape[1] - extra))
        before = (side, side)
    if before == (rows, columns) and old.shape == fresh.shape:
        return []
    change = f"position embedding: {before[0]}x{before[1]} tokens to {rows}x{columns}"
    if POSITIONS not in dict(model.named_parameters()):
        state[POSITIONS] = fresh
        return [f"{change}, computed anew by its fixed formula"]
    if math.prod(before) != old.shape[1] - extra:
        return []  # No grid that anybody knows; `check_fit` says so.
    grid = old[:, extra:].float().unflatten(1, before).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    state[POSITIONS] = torch.cat([old[:, :extra].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], 1).to(old.dtype)
    return [f"{change}, interpolated, for it was learned"]
