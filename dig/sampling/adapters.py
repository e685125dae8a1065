"""An adapter of ``train --lora``, or of peft's, merged into the weights that it was trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from dig.messages import describe
from dig.packages import require
from dig.sampling.weights import Weights
from dig.training.config import check_types
from dig.training.data.files import sha256_of
from dig.training.initial import fit_weights
from dig.training.lora import ABOUT_NAME, CONFIG_NAME, FOLDER, WEIGHTS_NAME, About
from dig.training.saving import CheckpointError, not_finite


def with_adapter(found: Weights, path: Path) -> tuple[Weights, str]:
    """Weights with an adapter merged into them, and the SHA-256 of the adapter.

    Args:
        found: What the adapter was trained on.
        path: Its folder, or the run's.

    Raises:
        CheckpointError: There is no adapter, or it is another model's.
        MissingPackageError: peft is not installed.
    """
    peft = require("peft", "--adapter")
    folder = path / FOLDER if (path / FOLDER / CONFIG_NAME).is_file() else path
    if not (folder / CONFIG_NAME).is_file() or not (folder / WEIGHTS_NAME).is_file():
        raise CheckpointError(
            f"{path} holds no adapter: neither a run of train --lora, nor {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    about = _read_about(folder / ABOUT_NAME)
    spec, names = found.spec, found.class_names
    if about is not None:
        names = about.class_names
        spec = replace(spec, input_size=about.input_size, num_classes=len(names))
        if about.base_sha256 not in ("", found.sha256):
            raise CheckpointError(
                f"{path} adapts other weights ({about.base_sha256[:12]}) than those of {found.path} "
                f"({found.sha256[:12]}): name the file that it was trained on"
            )
    # What of the label table is new comes with the adapter.
    first = fit_weights(found, spec, names, seed=0)
    model = spec.build()
    model.load_state_dict(first.state)
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.peft_type != "LORA":
            raise ValueError(f"it is of the kind {config.peft_type}; LORA is what can be merged")
        config.init_lora_weights = True
        adapted = peft.get_peft_model(model, config)
        tensors = load_file(folder / WEIGHTS_NAME)
        if wrong := not_finite(tensors):
            raise ValueError(f"{wrong} is not finite")
        result = peft.set_peft_model_state_dict(adapted, tensors)
        missing = [name for name in result.missing_keys if "lora_" in name]
        if strange := [*result.unexpected_keys, *missing]:
            raise ValueError(f"{strange[0]} and {len(strange) - 1} more do not fit")
    except (ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is no adapter of {spec.describe()}: {describe(error)[:300]}") from None
    state = adapted.merge_and_unload().state_dict()
    changes: dict[str, Any] = {} if about is None else {"loss": about.loss, "step": about.step}
    if about is not None and found.unlabelled is not None:
        # Beside what the weights were shown that it adapts.
        changes["unlabelled"] = found.unlabelled + about.label_dropout * about.batch * about.step
    return (
        replace(found, spec=spec, state=state, class_names=names, **changes),
        sha256_of(folder / WEIGHTS_NAME),
    )


def _read_about(path: Path) -> About | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        check_types(About, content)
        return About(
            **{**content, "input_size": tuple(content["input_size"]), "class_names": tuple(content["class_names"])}
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {describe(error)}") from None
