"""Optional packages: asked for by name, never swapped silently for something else."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType

DISTRIBUTIONS = {
    "fla": "flash-linear-attention",
    "flash_attn": "flash-attn",
    "flash_attn.cute": "flash-attn-4",
    "flash_attn_interface": "flash-attn-3",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "triton": "triton",
    "diffusers": "diffusers",
    "tensorboard": "tensorboard",
    "torch_fidelity": "torch-fidelity",
    "peft": "peft",
    "wandb": "wandb",
}
"""Import name → name on PyPI of every package that the project can do without."""
EXTRAS = {
    "diffusers": "train", "tensorboard": "train", "torch_fidelity": "fid", "peft": "lora", "wandb": "wandb",
    "flash_attn": "gpu-built", "mamba_ssm": "gpu-built", "causal_conv1d": "gpu-built",
}  # fmt: skip
"""Import name → the extra that brings it, where that is not ``gpu``."""


class MissingPackageError(ImportError):
    """An implementation was asked for whose package is not installed."""


def _known_as(module: str) -> str:
    """What `DISTRIBUTIONS` calls a module's package: the module itself, where it comes alone, or its first part."""
    return module if module in DISTRIBUTIONS else module.partition(".")[0]


def is_installed(module: str) -> bool:
    """Say whether the package of ``module`` can be found, without importing it.

    A folder that only holds another package's part (``flash_attn`` with nothing but FlashAttention 4 in it) is none.
    """
    package = _known_as(module)
    if "." in package:
        try:
            return bool(metadata.version(DISTRIBUTIONS[package]))
        except metadata.PackageNotFoundError:
            return False
    spec = importlib.util.find_spec(package)
    return spec is not None and (spec.origin is not None or package not in DISTRIBUTIONS)


def missing_message(module: str, purpose: str) -> str:
    """One line that says what is missing, what for, and how to install it."""
    package = _known_as(module)
    if package not in DISTRIBUTIONS:  # Of somebody's own family: its name on PyPI is anybody's guess.
        return f"{purpose} needs the package {package}, which is not installed"
    if package == "flash_attn_interface":
        return f"{purpose} needs the package flash-attn-3; install it from flash-attention's sources, folder hopper"
    extra = EXTRAS.get(package, "gpu")
    return (
        f"{purpose} needs the package {DISTRIBUTIONS[package]}; install it with: "
        f"pip install 'dig-diffusion[{extra}]' (see README.md)"
    )


def require(module: str, purpose: str) -> ModuleType:
    """Import ``module``, or raise `MissingPackageError` naming the package and the extra.

    Args:
        module: Dotted import name.
        purpose: What needs it, as the start of the message: ``"backend='fla'"``.
    """
    if not is_installed(module):
        raise MissingPackageError(missing_message(module, purpose))
    if module.startswith("fla."):
        _import_fla_without_models()
    with quietly():
        return importlib.import_module(module)


@contextmanager
def quietly() -> Iterator[None]:
    """Within, nobody logs or warns: what libraries say as they are imported, or before they raise, is said by us."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _import_fla_without_models() -> None:
    """Import flash-linear-attention's kernels without its language models.

    ``import fla`` brings in all of them, and transformers with them, which takes some 14 s; it does without where they
    cannot be imported. None in ``sys.modules`` is Python's way to say so, and is taken back at once.
    """
    if "fla" in sys.modules:
        return
    heavy = ("fla.layers", "fla.models")
    sys.modules.update(dict.fromkeys(heavy))  # type: ignore[arg-type]
    try:
        importlib.import_module("fla")
    finally:
        for name in heavy:
            sys.modules.pop(name, None)
