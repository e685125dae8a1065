"""Which parts of DiG earn their place, and does it gain by size and by tokens? Trained small, on Fashion-MNIST.

Three experiments, each a list of arms that are trained from several seeds:

* ``srem``: the paper's Tab. 2, S/4 from one scan to all of SREM, and the U shape of its later version; equal steps.
* ``scaling``: the paper's Fig. 5, against size at equal tokens, and against tokens at equal size; equal steps.
* ``seconds``: DiG-S/2 and the compiled Flash-DiT-S/2 for the same seconds of training, alone on the GPU.

::

    python examples/ablation.py DATA OUT        DATA holds Fashion-MNIST's idx files; OUT gets ablation.jsonl
    python -m reports.ablation OUT/ablation.jsonl --out OUT/report

A finished run is a line of ``ablation.jsonl``; run again, what is missing is made. Runs of the first two experiments
share the GPU, for nothing of them is timed.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.messages import OneLineCommand, one_of, refuse
from dig.messages import describe

if TYPE_CHECKING:
    import torch

    from dig.training.step import TrainingStep

NAME = "ablation.jsonl"
BATCH = 128
RATE = 3e-4
WARMUP = 100
AVERAGE = 0.998
HELD_OUT = 4096
"""Images of the test split whose loss is taken, each with one timestep, spread evenly over all."""
REAL = 10_000
"""Images of the training split that samples are compared with."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is trained from each seed.

    Attributes:
        experiment: One of the three.
        name: Its own, within the experiment.
        model: By name.
        options: The family's, beside the backend.
    """

    experiment: str
    name: str
    model: str
    options: Mapping[str, str] = field(default_factory=dict)


def _dig(name: str, scan: str, convolution: str, **more: str) -> Arm:
    options = {"variant": "release", "scan": scan, "convolution": convolution, **more}
    return Arm(experiment="srem", name=name, model="DiG-S/4", options=options)


RELEASE = {"variant": "release"}
ARMS = (
    _dig("causal", "causal", "none"),
    _dig("bidirectional", "bidirectional", "none"),
    _dig("default-init", "bidirectional", "default-init"),
    _dig("identity-init", "bidirectional", "identity-init"),
    _dig("crisscross", "crisscross", "identity-init"),
    _dig("u-shape", "crisscross", "identity-init", skip="linear"),
    _dig("u-shape-zero", "crisscross", "identity-init", skip="identity-init"),
    Arm(experiment="srem", name="attention", model="Flash-DiT-S/4"),
    Arm(experiment="scaling", name="S/8", model="DiG-S/8", options=RELEASE),
    Arm(experiment="scaling", name="S/4", model="DiG-S/4", options=RELEASE),
    Arm(experiment="scaling", name="S/2", model="DiG-S/2", options=RELEASE),
    Arm(experiment="scaling", name="B/4", model="DiG-B/4", options=RELEASE),
    Arm(experiment="scaling", name="L/4", model="DiG-L/4", options=RELEASE),
    Arm(experiment="seconds", name="DiG", model="DiG-S/2", options=RELEASE),
    Arm(experiment="seconds", name="Flash-DiT", model="Flash-DiT-S/2"),
)
"""In the order of the paper's tables."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a call have in common.

    Attributes:
        data: Folder of the idx files.
        out: Folder that gets the rows.
        classifier: Whose features measure samples.
        steps: Of a run of equal steps.
        budget: Seconds of a run of equal seconds.
        samples: Drawn from each run.
        sampling_steps: DDIM's.
        device: ``cuda`` or ``cpu``.
        batch: Images a step.
    """

    data: Path
    out: Path
    classifier: Path
    steps: int
    budget: float
    samples: int
    sampling_steps: int
    device: str
    batch: int


def _done(path: Path) -> set[tuple[str, str, int]]:
    if not path.exists():
        return set()
    records = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}"))
    return {(record["experiment"], record["arm"], record["seed"]) for record in records}


def _chosen(experiments: str, arms: str, seeds: int) -> list[tuple[Arm, int]]:
    """Arms and seeds in the order of the runs: all arms of a seed before the next one, so that tables fill evenly."""
    known = {arm.experiment for arm in ARMS}
    wanted, names = experiments.split(","), arms.split(",") if arms else None
    if unknown := [name for name in wanted if name not in known]:
        raise typer.BadParameter(f"no experiment is called {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if names and (unknown := [name for name in names if name not in {arm.name for arm in ARMS}]):
        raise typer.BadParameter(f"no arm is called {unknown[0]!r}; there are {', '.join(arm.name for arm in ARMS)}")
    found = [arm for one in wanted for arm in ARMS if arm.experiment == one and (names is None or arm.name in names)]
    return [(arm, seed) for one in wanted for seed in range(seeds) for arm in found if arm.experiment == one]


class Lane:
    """Runs one after another in one process: data, features and kernels are loaded once.

    Args:
        setting: Of all runs.
    """

    def __init__(self, setting: Setting) -> None:
        import torch

        from dig.diffusion import build_loss
        from dig.diffusion.noise import training_noise
        from dig.environment import describe_environment
        from dig.evaluation.features import ClassifierFeatures, DatasetBatches, extract
        from dig.evaluation.metrics import Gaussian
        from dig.training.config import DataSpec
        from dig.training.data.idx import IdxImages

        self.setting = setting
        self.device = torch.device(setting.device)
        self.dataset = IdxImages(setting.data)
        self.spec = DataSpec.of(self.dataset)
        self.features = ClassifierFeatures(setting.classifier, self.device)
        real = extract(self.features, DatasetBatches(self.dataset, min(REAL, len(self.dataset))), self.device)
        self.real = Gaussian.of(real)
        self.environment = describe_environment()
        test = IdxImages(setting.data, split="test")
        count = min(HELD_OUT, len(test)) if setting.device == "cuda" else min(64, len(test))
        held = [test[i] for i in range(count)]
        loss = build_loss("hybrid", device=self.device)
        uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        # Neighbours in the split are of any class; neighbours in time must be too.
        self.held = tuple(
            tensor.to(self.device)
            for tensor in (
                torch.stack([x for x, _ in held]),
                torch.tensor([y for _, y in held]),
                loss.times(uniform),
                training_noise(0, list(range(count)), self.spec.shape),
            )
        )
        self.loss = loss

    def run(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Train, measure; the run's line."""
        import torch

        from dig.diffusion.samplers import NotFiniteError
        from dig.training.blocks import blocks_of
        from dig.training.step import build_step

        config = self._config(arm, seed)
        step = build_step(config)
        if arm.experiment == "seconds" and self.device.type == "cuda" and not arm.model.startswith("DiG"):
            for block in blocks_of(step.model):
                block.compile()
        began = time.monotonic()
        steps, seconds = self._train(step, equal_seconds=arm.experiment == "seconds")
        ready = time.monotonic() - began - seconds
        failed = ""
        held: float | None = None
        distance: float | None = None
        try:
            held = self._held_out(step.ema)
            distance = self._distance(step.ema)
        except NotFiniteError as error:
            failed = str(error)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None
        del step
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        about = self.environment
        return {
            "experiment": arm.experiment,
            "arm": arm.name,
            "model": arm.model,
            "options": dict(config.model.options),
            "parameters": sum(p.numel() for p in config.model.build().parameters()) if seed == 0 else None,
            "seed": seed,
            "steps": steps,
            "batch": config.batch,
            "seconds": round(seconds, 3),
            "ready_seconds": round(ready, 3),
            "images_per_second": round(steps * config.batch / seconds, 1) if seconds else None,
            "alone": arm.experiment == "seconds",
            "failed": failed,
            "loss": held,
            "frechet": distance,
            "samples": self.setting.samples,
            "sampling_steps": self.setting.sampling_steps,
            "features": self.features.description,
            "peak_gib": peak,
            **{name: about.get(name) for name in ("gpu_name", "torch", "triton", "commit", "dirty")},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _config(self, arm: Arm, seed: int) -> Any:
        from dig.registry import parse_name
        from dig.spec import ModelSpec
        from dig.training.config import TrainConfig

        cuda = self.device.type == "cuda"
        family = parse_name(arm.model)[0].name
        backend = {"DiG": "triton", "Flash-DiT": "sdpa-cudnn"}[family] if cuda else None
        if not cuda and family == "Flash-DiT":
            backend = "sdpa-flash"
        options = dict(arm.options) | ({"backend": backend} if backend else {})
        shape = self.spec.shape
        model = ModelSpec(
            name=arm.model, options=options, input_size=shape[1:], in_channels=shape[0],
            num_classes=len(self.spec.class_names),
        )  # fmt: skip
        return TrainConfig(
            model=model, data=self.spec, device="cuda" if cuda else "cpu", steps=self.setting.steps,
            batch=self.setting.batch, seed=seed, learning_rate=RATE, warmup=WARMUP, ema=AVERAGE,
            execution="graph" if cuda else "eager", dtype="bf16" if cuda else "fp32",
            # Each in its fastest way: attention that repeats itself bit for bit is slower.
            deterministic=False,
        )  # fmt: skip

    def _train(self, step: TrainingStep, *, equal_seconds: bool) -> tuple[int, float]:
        """Steps and seconds of training, without the first step, which compiles and captures."""
        from dig.training.inputs import InputStream

        config, budget = step.config, self.setting.budget
        stream: Iterator[Any] = InputStream(
            config, self.dataset, step.loss, null_label=step.model.null_label, first_step=0, workers=0
        )
        done, began = 0, 0.0
        while True:
            step.run(next(stream), config.learning_rate * min(1.0, (done + 1) / max(1, config.warmup)))
            done += 1
            if done == 1:
                self._wait()
                began = time.monotonic()
            if equal_seconds:
                if done % 16 == 0:
                    self._wait()
                    if time.monotonic() - began >= budget:
                        break
            elif done == config.steps:
                break
        self._wait()
        seconds = time.monotonic() - began
        stream.loader.close()  # type: ignore[attr-defined]
        return done, seconds

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _held_out(self, model: torch.nn.Module) -> float:
        """Mean squared error of the predicted noise on images that no run has seen."""
        import torch

        from dig.diffusion.samplers import NotFiniteError

        errors = []
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            for x, y, t, noise in zip(*(tensor.split(512) for tensor in self.held), strict=True):
                errors.append(self.loss(model, x, y, t=t, noise=noise)["mse"].double())
        mean = float(torch.cat(errors).mean())
        if not math.isfinite(mean):
            raise NotFiniteError("the loss on held-out images is not finite: the run diverged")
        return mean

    def _distance(self, model: Any) -> float:
        """Fréchet distance of samples, without guidance, to the training split."""
        import torch

        import dig
        from dig.evaluation.features import array_batches, extract
        from dig.evaluation.metrics import Gaussian, frechet_distance

        drawn = dig.sample(model, samples=self.setting.samples, steps=self.setting.sampling_steps, sampler="ddim")
        pixels = drawn.pixels if isinstance(drawn.pixels, torch.Tensor) else torch.as_tensor(drawn.pixels)
        images = pixels.cpu().numpy()
        if images.shape[-1] == 1:
            images = images.repeat(3, axis=-1)
        return frechet_distance(self.real, Gaussian.of(extract(self.features, array_batches(images), self.device)))


@app.command(cls=OneLineCommand)
def main(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder of Fashion-MNIST's idx files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder that gets ablation.jsonl.")],
    classifier: Annotated[
        Path, typer.Option(help="Of `python -m dig classifier`: its features measure samples.")
    ] = Path("results/h100/fashion/classifier.safetensors"),
    experiments: Annotated[str, typer.Option(help="Some of srem, scaling, seconds.")] = "srem,scaling,seconds",
    arms: Annotated[str, typer.Option(help="Only these arms, by name; all if not given.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each run, where steps are equal.")] = 1000,
    budget: Annotated[float, typer.Option(min=0.1, help="Seconds of each run, where seconds are equal.")] = 20.0,
    samples: Annotated[int, typer.Option(min=130, help="Drawn from each run.")] = 2500,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Of each sample.")] = 25,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = BATCH,
    lanes: Annotated[int, typer.Option(min=1, help="Processes that share the GPU, where nothing is timed.")] = 3,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    lane: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train every arm from every seed, and append a line for each."""
    runs = _chosen(experiments, arms, seeds)
    out.mkdir(parents=True, exist_ok=True)
    path = out / NAME
    if lane is None:
        _check(data, classifier, device)
        _share_out(runs, lanes)
        return
    from dig.training.data.files import append_line

    setting = Setting(
        data=data, out=out, classifier=classifier, steps=steps, budget=budget, samples=samples,
        sampling_steps=sampling_steps, device=device, batch=batch,
    )  # fmt: skip
    done = _done(path)
    # Shared out before what is done is left out: another lane may have finished a run by now.
    mine = [(arm, seed) for arm, seed in runs[lane::lanes] if (arm.experiment, arm.name, seed) not in done]
    here = Lane(setting) if mine else None
    for arm, seed in mine:
        assert here is not None
        began = time.monotonic()
        record = here.run(arm, seed)
        append_line(path, json.dumps(record))
        numbers = ""
        if not record["failed"]:
            numbers = f"loss {record['loss']:.4f}, Fréchet distance {record['frechet']:.2f}"
        typer.echo(
            f"{arm.experiment} {arm.name} seed {seed}: {numbers or record['failed']}, {record['steps']} steps in "
            f"{record['seconds']:.1f} s, {time.monotonic() - began:.1f} s in all"
        )


def _check(data: Path, classifier: Path, device: str) -> None:
    """Refuse, in one line, what no lane could work with."""
    import torch

    from dig.evaluation.classifier import load_classifier
    from dig.training.data.idx import IdxImages

    one_of(device, "--device", ("cuda", "cpu"))
    if device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda finds no GPU here; --device cpu takes hours")
    try:
        for split in ("train", "test"):
            IdxImages(data, split=split)
        load_classifier(classifier, "cpu")
    except (ValueError, OSError) as error:
        refuse(describe(error))


def _share_out(runs: list[tuple[Arm, int]], lanes: int) -> None:
    """Start lanes; what is timed has the GPU to itself, after all others."""
    given = sys.argv[1:]
    for timed in (False, True):
        wanted = sorted({arm.experiment for arm, _ in runs if (arm.experiment == "seconds") == timed})
        if not wanted:
            continue
        count = 1 if timed else lanes
        words = [sys.executable, "-u", __file__, *given, "--experiments", ",".join(wanted), "--lanes", str(count)]
        processes = [subprocess.Popen([*words, "--lane", str(number)]) for number in range(count)]
        try:
            codes = [process.wait() for process in processes]
        except BaseException:
            for process in processes:
                process.kill()
            raise
        if any(codes):
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
