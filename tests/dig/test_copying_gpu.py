"""Collectives by copies on two real GPUs, against NCCL's: eagerly, and in CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from tests.dig import copying_job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    """What each rank of a job finds."""
    return copying_job.run(tmp_path_factory.mktemp("copying") / "job", "cuda", 2, seconds=100)


@pytest.mark.parametrize("check", [check.__name__ for check in copying_job.GPU_CHECKS])
def test_gpus_that_copy(found: list[dict[str, str | None]], check: str) -> None:
    assert [rank.get(check, "not reached") for rank in found] == [None] * len(found)
