"""Training on many GPUs, on paper: a step's compute from measured rows, its communication from links, what is exposed.

Everything is a formula of a few parameters, in bytes and seconds; docs/scaling.md says where each is from. n GPUs are m
nodes of g. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from bench.store.rows import Row
from bench.store.selection import newest

Kind = Literal["ddp", "fsdp"]
BLOCKS = 28
"""Of XL; what is sharded and gathered apart, beside the rest of the model."""


class MissingRowError(ValueError):
    """The rows hold nothing to work a figure out from; the message says what to measure."""


class AssumedError(ValueError):
    """What is assumed can't be of a machine that has measured these rows; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """What no row here says.

    Attributes:
        nvlink: Bytes a second that a GPU sends to others of its node, and receives: half of NVLink 4's 900 GB/s.
        nic: The same to other nodes: a 400 Gbit/s adapter a GPU.
        achieved: Share of either that a large message reaches.
        per_node: g.
        nvlink_latency, nic_latency: Seconds of a hop.
        bucket: Bytes of a message of ``ddp``, PyTorch's default.
        overlap: Share of a pass that communication may hide under: its first gradients, or last weights, have nothing
            to hide under.
        hbm: Bytes a second of the card's memory.
        memory: Bytes of it.
        optimizer_bytes: Of AdamW, a parameter: weight, two moments and gradient read in fp32, all but the last written.
        gradient_bytes: Of a gradient as it is sent.
        weight_bytes: Of a weight as ``fsdp`` gathers it.
        worth: Efficiency below which more GPUs are not worth it.
    """

    nvlink: float = 450e9
    nic: float = 50e9
    achieved: float = 0.8
    per_node: int = 8
    nvlink_latency: float = 2e-6
    nic_latency: float = 10e-6
    bucket: float = 25 * 2**20
    overlap: float = 0.9
    hbm: float = 3.35e12
    memory: float = 80e9
    optimizer_bytes: float = 28.0
    gradient_bytes: float = 4.0
    weight_bytes: float = 2.0
    worth: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Work:
    """A training step on one GPU: ``floor_s`` a pass + ``image_s`` an image + ``optimizer_s``.

    Attributes:
        parameters: Of the model.
        floor_s: Forward and backward pass of so few images that kernels' number and weights' bytes are their time.
        image_s: What each image adds.
        optimizer_s: AdamW.
        image_bytes: Activations of an image.
    """

    parameters: int
    floor_s: float
    image_s: float
    optimizer_s: float
    image_bytes: float

    def images_at_once(self, assumed: Assumed) -> int:
        """How many fit with weights, gradients, buckets and moments, 20 bytes a parameter, in 95% of the memory."""
        return max(1, math.floor((0.95 * assumed.memory - 20 * self.parameters) / self.image_bytes))

    def passes(self, images: float, assumed: Assumed) -> int:
        """Into how many passes a step's images fall, so that each fits; their gradients are added up."""
        return math.ceil(images / self.images_at_once(assumed))

    def pass_s(self, images: float, assumed: Assumed) -> float:
        """Forward and backward, one of a step's passes; a third of it is forward."""
        return self.floor_s + images / self.passes(images, assumed) * self.image_s


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step on n GPUs, in seconds.

    Attributes:
        kind: How.
        gpus: n.
        images: Of a GPU.
        compute_s: Forward, backward, optimizer.
        communication_s: All that is sent.
        exposed_s: What of it nothing hides.
        efficiency: Images a second over n times those of the GPU that it is compared with.
    """

    kind: Kind
    gpus: int
    images: float
    compute_s: float
    communication_s: float
    exposed_s: float
    efficiency: float

    @property
    def step_s(self) -> float:
        """The whole."""
        return self.compute_s + self.exposed_s

    @property
    def images_per_second(self) -> float:
        """Of all GPUs together."""
        return self.gpus * self.images / self.step_s


def nodes_of(gpus: int, assumed: Assumed) -> tuple[int, int]:
    """(m, g): how many nodes, and GPUs of each.

    Raises:
        ValueError: The last node would not be full.
    """
    per_node = min(gpus, assumed.per_node)
    if gpus < 1 or gpus % per_node:
        raise ValueError(f"gpus must be at least 1, and full nodes of {assumed.per_node} from there up; got {gpus}")
    return gpus // per_node, per_node


def gather_s(size: float, gpus: int, assumed: Assumed, *, messages: float = 1.0) -> float:
    """Seconds of an all-gather to ``size`` bytes on every GPU; a reduce-scatter from as many takes the same.

    Within a node a ring: (g - 1)/g of the bytes pass each GPU's link, in g - 1 hops. Across nodes, GPU by GPU of their
    counterparts, a g-th of the bytes: (m - 1)/m of that passes each adapter, in log2 m hops.

    Args:
        size: Bytes.
        gpus: n.
        assumed: Links.
        messages: Into how many the bytes fall; each has its hops' latency.
    """
    m, g = nodes_of(gpus, assumed)
    near = (g - 1) / g * size / (assumed.achieved * assumed.nvlink)
    far = (m - 1) / m * size / g / (assumed.achieved * assumed.nic)
    hops = (g - 1) * assumed.nvlink_latency + math.ceil(math.log2(m)) * assumed.nic_latency
    return near + far + messages * hops


def all_reduce_s(size: float, gpus: int, assumed: Assumed, *, messages: float = 1.0) -> float:
    """Seconds of an all-reduce: a reduce-scatter and an all-gather, in one node 2 (n - 1)/n of the bytes."""
    return 2 * gather_s(size, gpus, assumed, messages=messages)


def ddp_step(work: Work, images: float, gpus: int, assumed: Assumed) -> tuple[float, float, float]:
    """(compute, communication, exposed) seconds: gradients are averaged while the last pass' backward goes on."""
    passes, one = work.passes(images, assumed), work.pass_s(images, assumed)
    size = assumed.gradient_bytes * work.parameters
    sent = all_reduce_s(size, gpus, assumed, messages=math.ceil(size / assumed.bucket))
    exposed = max(0.0, sent - assumed.overlap * 2 / 3 * one)
    return passes * one + work.optimizer_s, sent, exposed


def fsdp_step(work: Work, images: float, gpus: int, assumed: Assumed) -> tuple[float, float, float]:
    """(compute, communication, exposed) seconds: weights are gathered in the first pass, gradients reduced and
    scattered in the last; each GPU moves its share of the weights. In a CUDA graph a block stays whole up to its last
    backward pass.
    """
    passes, one = work.passes(images, assumed), work.pass_s(images, assumed)
    forward, backward = assumed.overlap * one / 3, assumed.overlap * 2 / 3 * one
    gathered = gather_s(assumed.weight_bytes * work.parameters, gpus, assumed, messages=BLOCKS + 1)
    reduced = gather_s(assumed.gradient_bytes * work.parameters, gpus, assumed, messages=BLOCKS + 1)
    exposed = max(0.0, gathered - forward) + max(0.0, reduced - backward)
    return passes * one + work.optimizer_s / gpus, gathered + reduced, exposed


STEPS: dict[Kind, Callable[[Work, float, int, Assumed], tuple[float, float, float]]] = {
    "ddp": ddp_step,
    "fsdp": fsdp_step,
}


def step_of(kind: Kind, work: Work, *, images: float, gpus: int, assumed: Assumed, alone: float | None = None) -> Step:
    """A step on n GPUs.

    Args:
        kind: How.
        work: On one GPU.
        images: Of a GPU.
        gpus: n.
        assumed: The rest.
        alone: Images of the one GPU whose images a second count as efficiency 1; as many as here if not given.
    """
    compute, sent, exposed = STEPS[kind](work, images, gpus, assumed)
    on_one = images if alone is None else alone
    rate = on_one / ddp_step(work, on_one, 1, assumed)[0]
    return Step(
        kind=kind,
        gpus=gpus,
        images=images,
        compute_s=compute,
        communication_s=sent,
        exposed_s=exposed,
        efficiency=images / (compute + exposed) / rate,
    )


def stops_at(steps: Iterable[Step], assumed: Assumed) -> int:
    """The most GPUs, of those looked at, with an efficiency that is worth them; 0 where none has."""
    return max((step.gpus for step in steps if step.efficiency >= assumed.worth), default=0)


def find(rows: Iterable[Row], **wanted: object) -> Row:
    """The newest row with times of DiG, published variant, on this project's kernels in a CUDA graph.

    Args:
        rows: Where to look.
        **wanted: Fields of its case.

    Raises:
        MissingRowError: There is none.
    """
    fixed = {"processes": 1, "device": "cuda", "execution": "graph", "dtype": "bf16", "weights": "fp32", **wanted}
    options = {"backend": "triton", "variant": "release"}
    found = [
        row
        for row in newest(rows).rows
        if row.status == "ok"
        and dict(row.case.options) == options
        and all(getattr(row.case, name) == value for name, value in fixed.items())
    ]
    if not found:
        what = ", ".join(f"{name} {value}" for name, value in wanted.items())
        raise MissingRowError(
            f"no row of DiG:triton:variant=release in a graph with {what}; python -m bench run does it"
        )
    return max(found, key=lambda row: row.started_at)


def seconds(row: Row) -> float:
    """The median step."""
    assert row.median_ms is not None
    return row.median_ms / 1000


MODEL, MEASURED_AT, FEW, BATCH, MANY = "DiG-XL/2", 256, 1, 32, 64
"""What is trained; at which resolution its steps were measured; images of the forward passes and of the step."""


def rows_used(rows: Iterable[Row], resolutions: Iterable[int], *, model: str = MODEL) -> list[Row]:
    """The rows that `work_of` works from: the training step, two forward passes, and one of each other resolution.

    Raises:
        MissingRowError: One is not there.
    """
    rows = tuple(rows)
    found = [find(rows, model=model, resolution=MEASURED_AT, batch=BATCH, mode="train")]
    found += [find(rows, model=model, resolution=MEASURED_AT, batch=n, mode="forward") for n in (FEW, MANY)]
    others = [resolution for resolution in resolutions if resolution != MEASURED_AT]
    return found + [find(rows, model=model, resolution=there, batch=1, mode="forward") for there in others]


def work_of(rows: Iterable[Row], *, resolution: int, assumed: Assumed, model: str = MODEL) -> Work:
    """A training step of a model, from three measured ones at 256 pixels and the FLOPs of an image.

    Two forward passes, of 1 and of 64 images, give what one costs that has no images: the intercept. Forward and
    backward have three times that. What the training step of 32 images takes beyond it and AdamW is its images', and
    another resolution's in proportion to FLOPs. So are activations.

    Raises:
        MissingRowError: One of these rows is not there.
        AssumedError: They leave no time for images.
    """
    train, one, many, *others = rows_used(rows, (resolution,), model=model)
    slope = (seconds(many) - seconds(one)) / (many.case.batch - one.case.batch)
    floor = 3 * (seconds(one) - slope * one.case.batch)
    parameters, memory = train.parameters, train.memory
    if not parameters or memory is None or not memory.activations or not memory.gradients:
        raise MissingRowError(f"the row of {train.case.describe()} has no memory ledger; measure it again")
    optimizer = assumed.optimizer_bytes * parameters / assumed.hbm
    image = (seconds(train) - floor - optimizer) / train.case.batch
    if not image > 0:
        raise AssumedError(
            f"AdamW would take {1000 * optimizer:.3g} ms of the measured step's {1000 * seconds(train):.3g}, and leave "
            "its images no time: assume a larger hbm, or fewer optimizer_bytes"
        )
    # Gradients are among what lives within a step.
    activations = (memory.activations - memory.gradients) / train.case.batch
    more = _flops_an_image(others[0]) / _flops_an_image(one) if others else 1.0
    return Work(
        parameters=parameters,
        floor_s=floor,
        image_s=more * image,
        optimizer_s=optimizer,
        image_bytes=more * activations,
    )


def _flops_an_image(row: Row) -> float:
    if not row.flops:
        raise MissingRowError(f"the row of {row.case.describe()} has no FLOPs; measure it again")
    return row.flops / row.case.batch


def check_on_s(rows: Iterable[Row], *, model: str = "DiG-S/2") -> tuple[float, float]:
    """(estimated, measured) seconds of a training step that was measured: S/2 at 1024 pixels, one image.

    Estimated as `work_of` does it: images' share from 256 pixels, times the ratio of FLOPs.
    """
    rows = tuple(rows)
    one, many = (find(rows, model=model, resolution=MEASURED_AT, batch=n, mode="train") for n in (FEW, BATCH))
    there = find(rows, model=model, resolution=1024, batch=1, mode="train")
    image = (seconds(many) - seconds(one)) / (many.case.batch - one.case.batch)
    more = _flops_an_image(there) / _flops_an_image(one)
    return seconds(one) + (more - 1) * image, seconds(there)
