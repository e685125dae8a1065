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


@pytest.mark.parametrize("model", ["DiG-S/4", "Flash-DiT-S/4"])
def test_two_gpus_train_as_one(model: str, tmp_path: Path) -> None:
    data = make_fashion(tmp_path / "data")

    def train(out: str, *options: str, steps: int = 8) -> list[str]:
        words = ["--model", model, "--data", str(data), "--out", str(tmp_path / out), "--steps", str(steps)]
        return [*TRAIN, *words, *options]

    commands = [
        train("graph"),
        train("eager", "--execution", "eager"),
        train("again", steps=4),
        train("again"),
        train("fsdp", "--parallel", "fsdp"),
        train("fsdp-again", "--parallel", "fsdp", steps=4),
        train("fsdp-again", "--parallel", "fsdp"),
        train("fsdp-eager", "--parallel", "fsdp", "--execution", "eager"),
        train("nccl", "--sending", "collectives"),
        train("fsdp-nccl", "--parallel", "fsdp", "--sending", "collectives"),
        train("compiled", "--parallel", "fsdp", "--execution", "compile"),
        ["sample", "--checkpoint", str(tmp_path / "graph"), "--samples", "40", "--steps", "4", "--batch", "8",
         "--model-batch", "8", "--npz", str(tmp_path / "two.npz")],
    ]  # fmt: skip
    ended = end(start(tmp_path / "two", commands, tiny=False), seconds=500)
    assert ended == [0, 0], printed(tmp_path / "two", 0) + printed(tmp_path / "two", 1)
    alone = [train("one"), [*commands[-1][:-1], str(tmp_path / "one.npz")]]
    assert end(start(tmp_path / "alone", alone, ranks=1, tiny=False), seconds=200) == [0]
    log = printed(tmp_path / "two", 0)
    assert log.count("execution graph: ") == 8
    losses = {
        run: [json.loads(line)["loss"] for line in (tmp_path / run / "train.jsonl").read_text().splitlines()]
        for run in (
            "one",
            "graph",
            "eager",
            "again",
            "fsdp",
            "fsdp-again",
            "fsdp-eager",
            "compiled",
            "nccl",
            "fsdp-nccl",
        )
    }
    # Gone on with on as many ranks, and captured or not: the same bits.
    assert losses["again"] == losses["graph"]
    assert losses["eager"] == losses["graph"]
    assert losses["fsdp-again"] == losses["fsdp"]
    tensors = {
        run: read_checkpoint(checkpoint_files(tmp_path / run / "checkpoints")[0]).tensors
        for run in ("graph", "eager", "again")
    }
    for run in ("eager", "again"):
        assert not [name for name, one in tensors[run].items() if not torch.equal(one, tensors["graph"][name])], run
    for run in ("graph", "fsdp", "fsdp-eager", "compiled", "nccl", "fsdp-nccl"):
        assert losses[run] == pytest.approx(losses["one"], rel=2e-2), run
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
