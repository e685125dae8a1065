"""What runs in the process of one model: build it, sample batch after batch when told to, answer with seconds."""

from __future__ import annotations

import os
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from bench.measure.failures import failure
from bench.measure.steps import build_model, compile_parts
from bench.measure.versions import versions
from bench.sampling.rows import SamplingCase
from dig.registry import load_source
from dig.sampling.runner import BatchSampler, SamplePlan

GIB = 2**30


class Contestant:
    """A model of random weights, ready to sample.

    Args:
        case: What is measured.
    """

    def __init__(self, case: SamplingCase) -> None:
        self.case = case
        load_source(case.source)
        device = torch.device(case.device)
        model = build_model(case)
        if case.scope:
            compile_parts(model, scope=case.scope)
        plan = SamplePlan(
            classes=tuple(range(model.num_classes)),
            count=case.batch,
            sampler=cast(Any, case.sampler),
            steps=case.steps,
            cfg_scale=case.cfg,
            cfg_channels=cast(Any, case.cfg_channels),
            model_batch=case.batch,
            precision="bf16" if case.weights == "bf16" else "autocast" if case.dtype == "bf16" else "fp32",
        )
        self._sampler = BatchSampler(model.eval(), plan, device, graph=case.captures, finish=lambda x: x.cpu().numpy())
        self._number = 0

    def sample(self) -> float:
        """Make one more batch, other noise and classes each time; the seconds until its latents are in host memory.

        Raises:
            FloatingPointError: They are not finite.
        """
        started = time.perf_counter()
        latents: NDArray[Any] = self._sampler.batch(self._number)
        seconds = time.perf_counter() - started
        self._number += 1
        if not np.isfinite(latents).all():
            raise FloatingPointError("the samples are not finite")
        return seconds

    def peak_memory_gib(self) -> float | None:
        """The most that torch's allocator gave out at a time, weights and captured graph included."""
        return torch.cuda.max_memory_allocated() / GIB if self.case.device == "cuda" else None


def serve(connection: Connection, case: SamplingCase) -> None:
    """Entry of a model's process: answers ``prepare``, ``sample`` and ``finish``, until one fails.

    An answer is ``("ok", value)``, or ``("failed", (status, message))``.
    """
    contestant: Contestant | None = None
    try:
        while True:
            word = connection.recv()
            answer: Any
            if word == "prepare":
                started = time.perf_counter()
                contestant = Contestant(case)
                contestant.sample()
                answer = time.perf_counter() - started
            else:
                assert contestant is not None
                answer = contestant.sample() if word == "sample" else _summary(contestant)
            connection.send(("ok", answer))
    except EOFError:
        return  # The harness is done, or gone.
    except BaseException as error:
        traceback.print_exc()
        status, message = failure(error)
        connection.send(("failed", (status, message.split("\n")[0])))
        connection.close()
        # Without Python's clean-up, which after an error of the device may hang.
        os._exit(1)


def _summary(contestant: Contestant) -> dict[str, Any]:
    return {"peak_memory_gib": contestant.peak_memory_gib(), "versions": versions(contestant.case.device)}
