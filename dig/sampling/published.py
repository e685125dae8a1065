"""Files of weights that this project didn't write: told by their content, and never unpickled."""

from __future__ import annotations

import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from dig.checkpoints import from_release
from dig.training.saving import CheckpointError, not_finite

Kind = Literal["safetensors", "torch"]


def file_kind(path: Path) -> Kind:
    """What a file holds, by its first bytes: its name may be wrong.

    Raises:
        CheckpointError: Neither safetensors nor a file of torch.save; the message says what it looks like.
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        start = file.read(200)
    text = start.lstrip().lower()
    # First: a file of safetensors begins with its header's length, whose bytes may be those of a pickle.
    if start[8:9] == b"{":
        return "safetensors"
    # A zip archive, or a pickle as torch.save wrote it before.
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    if not start:
        looks = "it is empty"
    elif text.startswith(b"version https://git-lfs"):
        looks = "it is a pointer of Git LFS, not the file: git lfs pull fetches that"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        looks = "it is a page of HTML: a download that went elsewhere"
    else:
        looks = f"it begins with {start[:8]!r}"
    raise CheckpointError(f"{path} is neither safetensors nor a file of torch.save: {looks}")


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """What a published file holds.

    Attributes:
        state: Its tensors by name; the averaged weights where it has both.
        arguments: What its training was called with, where it says so: Meta's files hold an ``argparse.Namespace``.
        renamed: Whether its names were the DiG authors'.
    """

    state: dict[str, Tensor]
    arguments: Mapping[str, Any]
    renamed: bool = False


def read_state(path: Path) -> PublishedFile:
    """A published file as it is.

    Of what is not tensors, numbers and text only ``argparse.Namespace`` is let through: a bag of values that runs
    nothing, and which Meta's training code saves beside its weights.

    Raises:
        CheckpointError: It is damaged, is no state dict, or would have to run code to be read.
    """
    try:
        content: Any
        if file_kind(path) == "safetensors":
            content = load_file(path)
        else:
            # Opened here: by a path, torch too goes by the suffix.
            with path.open("rb") as file, torch.serialization.safe_globals([Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())
        found = re.search(r"Unsupported (?:global|class|operand)[^.]*|GLOBAL \S+", reason)
        if found is None:
            raise CheckpointError(f"cannot read {path}: {reason[:200]}; it is damaged or cut off") from None
        raise CheckpointError(
            f"{path} is refused: it holds more than tensors ({found.group(0)}), and reading that could run any code. "
            "Save its weights alone, as a state dict, where you trust it"
        ) from None
    except CheckpointError:
        raise
    # Bytes that are not what they say make its parsers raise nearly anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"cannot read {path}: {reason or type(error).__name__}") from None
    arguments = content.get("args") if isinstance(content, Mapping) else None
    for part in ("ema", "state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(part), Mapping):
            content = content[part]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dict: tensors by name, or those under ema, model or state_dict")
    for name, value in content.items():
        if wrong := _unusable(value):
            raise CheckpointError(f"{path} holds {name} as {wrong}; save its weights as dense fp32, fp16 or bf16")
    state = {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in content.items()}
    if wrong := not_finite(state):
        raise CheckpointError(f"{path} holds {wrong}, which is not finite; nothing can be sampled from it")
    return PublishedFile(state=state, arguments=vars(arguments) if isinstance(arguments, Namespace) else {})


def read_published(path: Path) -> PublishedFile:
    """`read_state`, under this project's names.

    Raises:
        CheckpointError: As there.
    """
    found = read_state(path)
    if not any(".attn.q_proj." in name for name in found.state):
        return found
    try:
        return replace(found, state=from_release(found.state), renamed=True)
    except KeyError as error:
        raise CheckpointError(f"{path}: {error.args[0]}") from None
    except (RuntimeError, IndexError) as error:
        raise CheckpointError(f"{path} holds projections that don't fit each other: {error}") from None


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _unusable(tensor: Tensor) -> str | None:
    """What a tensor is, if it is no weight as a module has it."""
    if tensor.is_quantized:
        return "a quantized tensor"
    if tensor.layout != torch.strided or tensor.is_nested:
        return f"a sparse tensor ({tensor.layout})" if not tensor.is_nested else "a nested tensor"
    if tensor.device.type == "meta":
        return "a tensor without values"
    return None if tensor.dtype in _FLOATS else f"{tensor.dtype}"
