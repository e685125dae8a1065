"""What ``train`` begins with: drawn weights, those of a file (``--init``), or a run's own checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dig.commands.common import one_device
from dig.commands.run_options import given, model_text

if TYPE_CHECKING:
    from dig.sampling.weights import Weights
    from dig.spec import ModelSpec
    from dig.training.config import DataSpec
    from dig.training.initial import FirstWeights

logger = logging.getLogger(__name__)


class Beginning:
    """The first weights of a run.

    Args:
        init: What ``--init`` names, if it does.
        out: The run's folder. With checkpoints in it, the file was read before, and isn't again.

    Attributes:
        begun: The run that lies there, if one does.
        path: The file of the weights, where it was found: a run's folder will have another newest checkpoint one day.
    """

    def __init__(self, init: Path | None, out: Path) -> None:
        from dig.training.resuming import recorded_config
        from dig.training.saving import FOLDER, checkpoint_files

        self.begun = recorded_config(out)
        self.path = init
        self._goes_on = self.begun is not None and bool(checkpoint_files(out / FOLDER))
        self._found: Weights | None = None

    def model(self, context: typer.Context, model: str, device: str) -> str:
        """The model to train, as a command line names it: that of the file, unless another was asked for."""
        if self._goes_on and given(context, "init") and given(context, "resume"):
            raise ValueError("--resume goes on from the run's own checkpoint; --init begins another run")
        source = context.get_parameter_source("model")
        if self.path is None or source is None or source.name != "DEFAULT":
            return model
        if self._goes_on and self.begun is not None:
            return model_text(self.begun.model, self.begun.device)
        where = one_device(device)
        return model_text(self._read(where, None).spec, where)

    def weights(self, spec: ModelSpec, data: DataSpec, *, device: str, loss: str, seed: int) -> FirstWeights | None:
        """The weights of the file, fitted to the model; None without one, and where a checkpoint holds later ones.

        Raises:
            CheckpointError: There are none, or they are another architecture's.
        """
        if self.path is None or self._goes_on:
            return None
        from dig.training.initial import fit_weights

        found = self._read(device, model_text(spec, device))
        if warning := found.check_average():
            logger.warning("%s", warning)
        if found.step is not None and found.loss != loss:
            logger.warning("the weights of %s were trained with the loss %s, not %s", found.path, found.loss, loss)
        if (found.latent_scale is None) != (data.latent_scale is None):
            kinds = ("pixels", "latents") if found.latent_scale is None else ("latents", "pixels")
            logger.warning("the weights of %s are of a model of %s; the data are %s", found.path, *kinds)
        return fit_weights(found, spec, data.class_names, seed=seed)

    def sha256(self, first: FirstWeights | None, *, resuming: bool) -> str:
        """Of the file of the first weights; empty without one."""
        if first is not None:
            return first.sha256
        if self.begun is None or (self.path is None and not resuming):
            return ""
        from dig.training.saving import SHARDS, checkpoint_sha256

        a_file = self.path is not None and (self.path.is_file() or self.path.suffix == SHARDS)
        if self.path is not None and a_file and not resuming:
            return checkpoint_sha256(self.path)
        # A folder may hold later checkpoints by now, and a file may have gone.
        return self.begun.init

    def lora_whole(self, first: FirstWeights | None, spec: ModelSpec) -> tuple[str, ...]:
        """Names of the modules that are trained beside adapters: the label table, where rows of it are new."""
        if first is None:
            return self.begun.lora_whole if self.begun is not None else ()
        if not first.new_labels:
            return ()
        from dig.training.initial import label_embedders

        return tuple(label_embedders(spec.build()))

    def _read(self, device: str, model: str | None) -> Weights:
        from dig.training.initial import read_weights

        assert self.path is not None
        if self._found is None:
            self._found = read_weights(self.path, device=device, model=model)
            self.path = self._found.path
        return self._found
