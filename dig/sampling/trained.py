"""What a model was trained with and as: all that sampling has to know beside its weights, also as JSON in a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dig.diffusion import LossName
from dig.family import BACKEND
from dig.fields import fits
from dig.spec import VAE_FACTOR, ModelSpec
from dig.training.saving import CheckpointError

SCHEMA = 1
HEADER = "dig-model"
"""The entry of an exported file's header, and of its folder's config.json, that holds `Trained.to_json`."""

WeightsChoice = Literal["averaged", "raw"]
"""Of a run's checkpoint: the moving average of its weights, or the weights of its last step."""
FEW_DROPPED = 100
"""Images shown without their label, fewer than which leave the null label's embedding about as it began."""
MOSTLY_FIRST = 0.1
"""An average of more than this share of the first weights is worth a warning."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a model is, and what it was trained with; its weights are elsewhere.

    Attributes:
        path: The file that its weights were read from.
        sha256: Of the file.
        spec: The model, its backend chosen for the device.
        choice: Which of a run's weights they are; None of a published file's.
        class_names: Name of each label, where it is known.
        latent_scale: What latents were multiplied with; None for a model of pixels.
        loss: What the model was trained with, which decides on the samplers.
        step: Steps it was trained for, where that is known.
        seconds: Time it was trained for, likewise.
        vae_sha256: Of the weights of the VAE that its latents were made with, likewise.
        vae: A folder with the VAE that came with the weights, likewise.
        unlabelled: About how many images it was shown without their label, likewise.
        share_of_first: How much of averaged weights is still the first ones, 0 to 1.
    """

    path: Path
    sha256: str
    spec: ModelSpec
    class_names: tuple[str, ...] = ()
    latent_scale: float | None
    loss: LossName = "hybrid"
    step: int | None = None
    seconds: float | None = None
    choice: WeightsChoice | None = None
    vae_sha256: str | None = None
    vae: str | None = None
    unlabelled: float | None = None
    share_of_first: float = 0.0

    @property
    def latent(self) -> bool:
        """Whether the model works on a VAE's latents rather than on pixels."""
        return self.latent_scale is not None

    @property
    def num_classes(self) -> int:
        """Labels, the null label left out."""
        return self.spec.num_classes

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its images in pixels; of latents, as Stable Diffusion's VAE decodes them, 8 times."""
        height, width = self.spec.input_size
        factor = VAE_FACTOR if self.latent else 1
        return height * factor, width * factor

    def class_name(self, label: int) -> str:
        """A label's name; its number where names are not known, ``no class`` of the null label."""
        if label >= self.num_classes:
            return "no class"
        return self.class_names[label] if self.class_names else str(label)

    def check_guidance(self, *, guided: bool, null: bool) -> str | None:
        """Whether samples that take the null label can mean anything: a warning, or None.

        Args:
            guided: Whether there is guidance.
            null: Whether samples of no class are asked for.

        Raises:
            ValueError: It was never trained: what it adds is noise that looks like a result.
        """
        if not (guided or null) or self.unlabelled is None or self.unlabelled >= FEW_DROPPED:
            return None
        what = "guidance" if guided else "samples of no class"
        if self.unlabelled == 0:
            remedy = "use --cfg 1" if guided else "name classes"
            raise ValueError(
                f"{what} would mean nothing: {self.path} was trained with --label-dropout 0, never without a label; "
                f"{remedy}, or train with label dropout"
            )
        return f"{what} may mean little: {self.path} has seen about {self.unlabelled:.0f} images without their label"

    def check_average(self) -> str | None:
        """A warning where averaged weights are still mostly the first ones, which draw noise; or None."""
        if self.choice != "averaged" or self.share_of_first <= MOSTLY_FIRST:
            return None
        return (
            f"the averaged weights of {self.path} are still {100 * self.share_of_first:.0f}% the first ones, which "
            "draw noise: --weights raw samples from the last ones"
        )

    def to_json(self) -> dict[str, Any]:
        """As plain values, without what depends on this machine: file, backend, the VAE's folder."""
        model = dataclasses.asdict(self.spec)
        model["options"] = {name: word for name, word in self.spec.options.items() if name != BACKEND}
        said = {name: getattr(self, name) for name in _SAID}
        content: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, "model": model, **said}))
        return content


_SAID: dict[str, Any] = {
    "class_names": tuple[str, ...],
    "latent_scale": float | None,
    "loss": LossName,
    "step": int | None,
    "seconds": float | None,
    "choice": WeightsChoice | None,
    "vae_sha256": str | None,
    "unlabelled": float | None,
    "share_of_first": float,
}
"""Of `Trained`, what a file says of itself beside the model."""
_MODEL: dict[str, Any] = {
    "name": str,
    "options": Mapping[str, str],
    "input_size": tuple[int, int],
    "in_channels": int,
    "num_classes": int,
    "source": str,
}


def read_said(content: object, path: Path) -> dict[str, Any]:
    """Fields of `Trained` from what `Trained.to_json` gave: all but ``path`` and ``sha256``.

    Raises:
        CheckpointError: It is something else; the message names the file.
        FamilyError: The model's family cannot be had here.
    """
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path} does not say which model it is, as python -m dig export does")
    if content.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has the schema {content.get('schema')!r}; this version reads {SCHEMA}")
    said: dict[str, Any] = {}
    model: dict[str, Any] = {}
    parts: tuple[Any, ...] = ((_SAID, content, said), (_MODEL, content["model"], model))
    for known, values, found in parts:
        for name, kind in known.items():
            if name not in values or not fits(values[name], kind):
                raise CheckpointError(f"{path} says {name} {values.get(name)!r:.60}, which cannot be")
            found[name] = values[name]
    for name in ("step", "seconds", "unlabelled", "latent_scale", "share_of_first"):
        if said[name] is not None and said[name] < 0:
            raise CheckpointError(f"{path} says {name} {said[name]}, which cannot be")
    said["class_names"] = tuple(said["class_names"])
    try:
        said["spec"] = ModelSpec(**model)
    except ValueError as error:
        raise CheckpointError(f"{path} is of a model that cannot be had here: {error}") from None
    if said["class_names"] and len(said["class_names"]) != said["spec"].num_classes:
        raise CheckpointError(f"{path} names {len(said['class_names'])} classes of {said['spec'].num_classes}")
    return said
