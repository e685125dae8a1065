"""What only two GPUs show: ranks over NCCL, and a step with DistributedDataParallel as a CUDA graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dig.training.saving import checkpoint_files, read_checkpoint
from tests.dig.parallel_job import end, printed, start
from tests.dig.tiny import make_fashion

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
TRAIN = ["train", "--batch", "32", "--log-every", "1", "--save-every", "4", "--ema", "0.9", "--grid-every", "6"]
TRAIN += [
    "--grid-steps",
    "4",
    "--device",
    "cuda",
    "--log",
    "jsonl",
    "--workers",
    "0",
    "--clip",
    "1",
    "--accumulate",
    "2",
]


MODELS = ["DiG-S/4", "Flash-DiT-S/4"]
FSDP = ("--parallel", "fsdp")
COPIES = ("--sending", "copies")


class Runs:
    """Runs of one model on two GPUs, a folder each, and the same on one."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model, self.data = folder, model, make_fashion(folder / "data")

    def train(self, out: str, *options: str, steps: int = 8) -> list[str]:
        words = ["--model", self.model, "--data", str(self.data), "--out", str(self.folder / out)]
        return [*TRAIN, *words, "--steps", str(steps), *options]

    def sample(self, npz: str) -> list[str]:
        return ["sample", "--checkpoint", str(self.folder / "graph"), "--samples", "40", "--steps", "4", "--batch", "8",
                "--model-batch", "8", "--npz", str(self.folder / npz)]  # fmt: skip

    def run(self, *commands: list[str], ranks: int = 2) -> str:
        """What was printed by the first rank."""
        log = self.folder / f"log-{ranks}"
        ended = end(start(log, list(commands), ranks=ranks, tiny=False), seconds=400)
        assert ended == [0] * ranks, "".join(printed(log, rank) for rank in range(ranks))
        return printed(log, 0)

    def losses(self, out: str) -> list[float]:
        lines = (self.folder / out / "train.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    def tensors(self, out: str) -> dict[str, torch.Tensor]:
        return read_checkpoint(checkpoint_files(self.folder / out / "checkpoints")[0]).tensors

    def same_bits(self, one: str, other: str) -> None:
        assert self.losses(one) == self.losses(other)
        first, second = self.tensors(one), self.tensors(other)
        assert not [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]

    def close(self, *outs: str) -> None:
        """To the losses of one GPU."""
        self.run(self.train("one"), ranks=1)
        for out in outs:
            assert self.losses(out) == pytest.approx(self.losses("one"), rel=2e-2), out


@pytest.mark.parametrize("model", MODELS)
def test_two_gpus_train_as_one(model: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, model)
    log = runs.run(
        runs.train("graph"),
        runs.train("eager", "--execution", "eager"),
        runs.train("again", steps=4),
        runs.train("again"),
        runs.sample("two.npz"),
    )
    assert log.count("execution graph: ") == 3
    # Captured or not, and gone on with on as many ranks: the same bits.
    runs.same_bits("eager", "graph")
    runs.same_bits("again", "graph")
    runs.close("graph")
    runs.run(runs.sample("one.npz"), ranks=1)
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()


@pytest.mark.parametrize("model", MODELS)
def test_two_gpus_share_a_model(model: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, model)
    log = runs.run(
        runs.train("fsdp", *FSDP),
        runs.train("again", *FSDP, steps=4),
        runs.train("again", *FSDP),
        runs.train("eager", *FSDP, "--execution", "eager"),
        runs.train("compiled", *FSDP, "--execution", "compile"),
    )
    assert log.count("execution graph: ") == 3
    assert runs.losses("again") == runs.losses("fsdp")
    runs.close("fsdp", "eager", "compiled")


@pytest.mark.parametrize("model", MODELS)
def test_two_gpus_copy_from_each_other(model: str, tmp_path: Path) -> None:
    runs = Runs(tmp_path, model)
    runs.run(
        runs.train("graph", *COPIES),
        runs.train("eager", *COPIES, "--execution", "eager"),
        runs.train("fsdp", *FSDP, *COPIES),
        runs.train("fsdp-again", *FSDP, *COPIES, steps=4),
        runs.train("fsdp-again", *FSDP, *COPIES),
    )
    runs.same_bits("eager", "graph")
    assert runs.losses("fsdp-again") == runs.losses("fsdp")
    runs.close("graph", "fsdp")
