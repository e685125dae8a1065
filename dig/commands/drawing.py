"""What ``sample`` and ``evaluate`` share: from what was typed to a sampler that is ready, everything checked."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from dig.commands.common import one_device, open_decoder
from dig.launched import follows
from dig.memory import peak_memory
from dig.messages import one_line
from dig.progress import following

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from dig.sampling.decoder import Decoder
    from dig.sampling.runner import BatchSampler, SamplePlan
    from dig.sampling.sharing import Sharing
    from dig.sampling.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was typed of a model and its samples; see the options of ``sample``."""

    checkpoint: Path
    samples: int | None = None
    classes: str | None = None
    sampler: str | None = None
    steps: int | None = None
    eta: float = 0.0
    cfg: float = 1.0
    cfg_channels: str = "three"
    seed: int = 0
    first: int = 0
    model_batch: int | None = None
    vae: str | None = None
    other_vae: bool = False
    weights: str | None = None
    latents: bool = False
    model: str | None = None
    image_size: int | None = None
    num_classes: int | None = None
    backend: str | None = None
    dtype: str | None = None
    device: str = "auto"
    execution: str | None = None
    adapter: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A plan that is checked, and its weights; no model is built yet."""

    found: Weights
    plan: SamplePlan
    decoder: Decoder | None
    device: str
    captures: bool
    latents: bool
    adapter_sha256: str | None = None

    def about(self) -> dict[str, Any]:
        """What the samples are of, for whatever file they go into."""
        return {
            "model": self.found.spec.name,
            "options": dict(self.found.spec.options),
            "checkpoint": self.found.path.name,
            "sha256": self.found.sha256,
            **({"adapter_sha256": self.adapter_sha256} if self.adapter_sha256 is not None else {}),
            "weights": self.found.choice,
            "step": self.found.step,
            "seconds": self.found.seconds,
            "vae_sha256": self.decoder.sha256 if self.decoder is not None else None,
            "device": self.device,
        }

    def parameters(self) -> int:
        """Numbers in the model's weights that are trained."""
        from dig.training.needs import count_parameters

        return count_parameters(self.found.spec)

    def runner(self, console: Console | None) -> BatchSampler:
        """Build the model, say what it is where there is a console, and make it ready."""
        import torch

        from dig.sampling.runner import BatchSampler

        network = self.found.build(self.device)
        if self.plan.precision == "bf16":
            network.to(torch.bfloat16)
        at = f", step {self.found.step}" if self.found.step is not None else ""
        if console is not None:
            console.print(f"{self.found.spec.describe()}{at}, on {self.device}")
        finish = _finish(self.decoder, latents=self.latents)
        return BatchSampler(network, self.plan, torch.device(self.device), graph=self.captures, finish=finish)


def prepare(asked: Asked, console: Console) -> Drawing:
    """Check what was asked for, read the weights, and say what is doubtful.

    Raises:
        ValueError: It can't be sampled; the message says what to change.
    """
    where = one_device(asked.device)
    captures = (asked.execution or ("graph" if where == "cuda" else "eager")) == "graph"
    if asked.execution not in (None, "graph", "eager"):
        raise ValueError(f"execution must be graph or eager; got {asked.execution!r}")
    if captures and where != "cuda":
        raise ValueError("execution graph is a CUDA graph and needs an NVIDIA GPU; use eager")
    if asked.model is None and (asked.image_size, asked.num_classes) != (None, None):
        raise ValueError("--image-size and --num-classes describe a published file, together with --model")
    if asked.other_vae and asked.vae is None:
        raise ValueError("--other-vae is about the one that --vae names")
    from dig.registry import parse_name
    from dig.sampling.planning import doubts, plan_samples
    from dig.sampling.runner import default_precision
    from dig.sampling.weights import Published, load_weights, read_choice
    from dig.training.needs import Footprint, check_sampling

    published = None
    if asked.model is not None:
        published = Published(model=asked.model, image_size=asked.image_size, num_classes=asked.num_classes)
    found = load_weights(
        asked.checkpoint,
        device=where,
        published=published,
        backend=asked.backend,
        choice=read_choice(asked.weights),
    )
    adapter_sha256 = None
    if asked.adapter is not None:
        from dig.sampling.adapters import with_adapter

        found, adapter_sha256 = with_adapter(found, asked.adapter)
    size, (family, *_) = Footprint.of(found.spec), parse_name(found.spec.name)
    if asked.dtype == "bf16" and not family.cast:
        raise ValueError(f"{family.name} does not say that its models can be cast to bf16: use --dtype autocast")
    plan = plan_samples(
        classes=asked.classes,
        class_names=found.class_names,
        num_classes=found.spec.num_classes,
        loss=found.loss,
        tokens=size.tokens,
        device=where,
        samples=asked.samples,
        sampler=asked.sampler,
        cfg=asked.cfg,
        cfg_channels=asked.cfg_channels,
        model_batch=asked.model_batch,
        first=asked.first,
        steps=asked.steps,
        eta=asked.eta,
        seed=asked.seed,
        precision=default_precision(where, cast=where == "cuda" and family.cast)
        if asked.dtype is None
        else asked.dtype,
    )
    for warning in [] if follows() else doubts(found, plan):
        typer.echo(f"warning: {one_line(warning)}", err=True)
    check_sampling(size, device=where, at_once=plan.model_batch * (2 if plan.cfg_scale != 1 else 1))
    decoder = _open_vae(found, asked, where)
    return Drawing(
        found=found,
        plan=plan,
        decoder=decoder,
        device=where,
        captures=captures,
        latents=asked.latents,
        adapter_sha256=adapter_sha256,
    )


def draw_folder(
    drawing: Drawing, runner: BatchSampler, folder: Path, console: Console, sharing: Sharing | None = None
) -> None:
    """Samples into a folder of PNG files, with a bar, and a line at the end; ``sharing`` them with other processes."""
    from dig.sampling.folder import sample_to_folder
    from dig.sampling.sharing import ALONE

    sharing = sharing or ALONE

    plan, started = drawing.plan, time.perf_counter()
    memory = partial(peak_memory, drawing.device)
    with following(console, f"sampling into {folder}", total=plan.count, unit="sample", memory=memory) as told:
        runner.report = told.advance
        for progress in sample_to_folder(
            runner, folder, about=drawing.about(), class_names=drawing.found.class_names, sharing=sharing
        ):
            told.update(progress.done)
        runner.report = None
    if not sharing.leads:
        return
    made, seconds = progress.done - progress.skipped, time.perf_counter() - started
    before = f" ({progress.skipped} made before)" if progress.skipped else ""
    typer.echo(f"{plan.count} samples{before} in {folder}: {made / seconds:.3g} a second")


def _open_vae(found: Weights, asked: Asked, device: str) -> Decoder | None:
    """The VAE for a model's latents; None of a model of pixels, and of latents that stay as they are."""
    if asked.latents:
        if found.latent_scale is None:
            raise ValueError("this model works on pixels: it has no --latents")
        if asked.vae is not None:
            raise ValueError("choose --vae (images) or --latents, not both")
        return None
    decoder = open_decoder(
        asked.vae if asked.vae is not None else found.vae,
        found.latent_scale,
        device,
        channels=found.spec.in_channels,
        made_by=found.vae_sha256,
        other=asked.other_vae,
    )
    if decoder is None and found.latent_scale is not None:
        raise ValueError(
            "this model makes latents: give --vae (diffusers' AutoencoderKL, a folder or a name) to get images, "
            "or --latents to keep them in the npz as they are"
        )
    return decoder


def _finish(decoder: Decoder | None, *, latents: bool) -> Callable[[Tensor], NDArray[Any]]:
    """What becomes of a batch of the model's."""
    from dig.sampling.images import to_pixels

    if latents:
        return lambda x: x.cpu().numpy()
    if decoder is None:
        return to_pixels
    return lambda x: to_pixels(decoder.decode(x))
