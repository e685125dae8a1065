"""One step of training, eagerly, compiled, or as one CUDA graph; and all of the state that it moves on.

The step is one function of static tensors: inputs are copied in before it, sums of losses are read after it, and
nothing in between asks the device for a value. That is what lets a CUDA graph hold all of it, and what makes the other
two run without waiting.

Shapes: A parts of a step's batch, B samples of a part.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dig.diffusion import Loss, build_loss
from dig.graphs import Captured, CaptureError, capture, on_capture_stream
from dig.graphs.capturing import WARMUP
from dig.layers import Backbone, LabelEmbedder
from dig.model import DiG
from dig.training.average import moving_average
from dig.training.blocks import blocks_of
from dig.training.config import TrainConfig
from dig.training.freezing import freeze
from dig.training.inputs import StepInputs
from dig.training.lora import attach
from dig.training.shares import local, whole

if TYPE_CHECKING:
    from dig.training.parallel.windows import Windows
    from dig.training.parallel.wrapping import Kind, Parallel, Sending

logger = logging.getLogger(__name__)

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def use_deterministic_algorithms() -> None:
    """Tell PyTorch to repeat itself on a GPU, or to warn where it can't. Before CUDA's first use.

    Steps of training are stricter: `TrainingStep`.

    Atomic additions come in any order, and rounding makes of each order another sum.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    # Filling fresh memory would show reads of what nobody wrote, at the price of a pass over every buffer.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def _strictly_deterministic() -> Iterator[None]:
    """Refuse operations that can't repeat themselves, instead of warning; the mode before comes back.

    Only so does PyTorch's FlashAttention take its deterministic backward pass: while it may warn, it adds in any order.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def checkpoint_blocks(model: Backbone, *, preserve_rng_state: bool) -> int:
    """Make every block of a model keep its inputs only, and compute the rest again in the backward pass.

    Args:
        model: Parameters keep their names. Its blocks' ``forward`` is replaced, but for DiG, which does it itself
            (`dig.model.DiG.recompute_blocks`).
        preserve_rng_state: Whether blocks draw random numbers, which must be the same the second time.

    Returns:
        How many blocks there are.

    Raises:
        ValueError: The model has none.
    """
    if isinstance(model, DiG):
        model.recompute_blocks(preserve_rng_state=preserve_rng_state)
        return len(model.blocks)
    blocks = blocks_of(model)
    for block in blocks:
        block.forward = _checkpointed(block.forward, preserve_rng_state)
    return len(blocks)


def _checkpointed(forward: Callable[..., Any], preserve_rng_state: bool) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    return run


def stop_dropping_labels(model: Backbone) -> None:
    """Turn off a model's own dropping of labels: inputs of a run come with labels dropped already."""
    for module in model.modules():
        if isinstance(module, LabelEmbedder):
            module.dropout = 0.0


class TrainingStep:
    """A model in training: its weights, their moving average, the optimizer, and the step that moves them on.

    Args:
        config: The run.
        model: On its device, with its first weights. Its own dropping of labels is turned off: inputs come with
            labels dropped already.
        loss: With its constants on the device.
        parallel: How ranks of a job share the model, which is then a part of this one's batch; None for one process.
        sending: How ranks send: see `dig.training.parallel.wrap`.

    Attributes:
        ema: The model with averaged weights, in eval mode.
        adapted: peft's model around it, where it has adapters.
        sums: (terms + 1,) fp64 sums over steps of the loss's terms and of the gradient's norm.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Backbone,
        loss: Loss,
        parallel: Kind | None = None,
        sending: Sending = "collectives",
    ) -> None:
        self.config = config
        self.model = model
        self.loss = loss
        self.adapted: Any = None
        stop_dropping_labels(model)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        model.train()
        if config.checkpoint_blocks:
            checkpoint_blocks(model, preserve_rng_state=config.execution != "graph")
        compiled = config.execution == "compile"
        self._parallel: Parallel | None = None
        self._sharded = parallel == "fsdp"
        self._network: Callable[..., Tensor]
        if parallel is None:
            self._network = torch.compile(model) if compiled else model
        else:
            from dig.training.parallel.wrapping import mesh_of_all, shard, wrap

            mesh = mesh_of_all(config.device) if parallel == "fsdp" else None
            captured = config.execution == "graph"
            self._parallel = wrap(
                model, parallel, dtype=config.dtype, captured=captured, compiled=compiled, mesh=mesh, sending=sending
            )
            self._network = self._parallel.network
            if parallel == "fsdp":
                shard(self.ema, mesh=mesh, trains=False)
        self.device = next(model.parameters()).device
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._ema_parameters = [
            average
            for average, parameter in zip(self.ema.parameters(), model.parameters(), strict=True)
            if parameter.requires_grad
        ]
        self._average = moving_average(config.ema, warmup=config.ema_warmup)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        # AdamW makes its state at the first step; made now, it can be loaded.
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.sums = torch.zeros(len(loss.terms) + 1, dtype=torch.float64, device=self.device)
        self._captured: Captured[None] | None = None
        self._strict = config.deterministic
        # Of one process, and of what is sharded, there are none.
        self._laid = parallel != "ddp"
        # Ranks can't try a step and take it back: `build_step` has tried it for them.
        self._tried = parallel is not None

    @property
    def sending(self) -> str:
        """How ranks send, ``collectives`` or ``copies``; empty of one process."""
        return "" if self._parallel is None else self._parallel.sending

    @property
    def windows(self) -> Windows | None:
        """What ranks copy out of; None without copies."""
        return None if self._parallel is None else self._parallel.windows

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the run's future depends on, by name; not copies."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        named |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            if parameter in self.optimizer.state:
                state = self.optimizer.state[parameter]
                named |= {f"optimizer.{moment}.{name}": state[moment] for moment in _MOMENTS}
        return named | {"sums": self.sums}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite the state with `tensors` of another process.

        Raises:
            ValueError: They are another model's.
        """
        ours = self.tensors()
        wrong = sorted(ours.keys() ^ tensors.keys())
        wrong += [name for name in ours.keys() & tensors.keys() if ours[name].shape != tensors[name].shape]
        if wrong:
            raise ValueError(f"the checkpoint is of another model: {', '.join(wrong[:3])} do not fit")
        for name, tensor in ours.items():
            tensor.copy_(tensors[name])

    def run(self, inputs: StepInputs, learning_rate: float) -> None:
        """Do one step.

        Raises:
            CaptureError: It is the first one, in execution graph, and can't be captured.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.config.execution != "graph":
            there = inputs.to(self.device)
            if not self._laid:
                self._lay_buckets(there)
            self._step(there)
            return
        if self._captured is None:
            if not self._laid:
                # The pass after it tells ranks about the places from the host, which can't be in a graph: then it is
                # the first of those that warm up.
                with on_capture_stream(self.device):
                    self._lay_buckets(inputs.to(self.device))
            self._captured = self._capture(inputs)
        self._captured(inputs)

    def _lay_buckets(self, inputs: StepInputs) -> None:
        """Let DistributedDataParallel see in which order gradients come, after which it lays them out in its buckets.

        A gradient's place there decides in which order ranks are added up, and so on last bits. Before the first step,
        all steps have the same places, of a run that is gone on with too. It moves nothing.
        """
        self._laid = True
        cuda = self.device.type == "cuda"
        random = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None
        values = self.loss(self._model_fn, inputs.x[0], inputs.y[0], t=inputs.t[0], noise=inputs.noise[0])
        values["loss"].mean().backward()
        self.optimizer.zero_grad(set_to_none=True)
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], self.device)

    def _model_fn(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        bf16 = self.config.dtype == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            return self._network(x, t, y)

    def _step(self, inputs: StepInputs) -> None:
        """One step, by deterministic algorithms alone if the first one shows that this model can be trained so."""
        if not self._strict:
            self._update(inputs)
            return
        if self._tried:
            with _strictly_deterministic():
                self._update(inputs)
            return
        self._tried = True
        cuda = self.device.type == "cuda"
        random = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None
        try:
            with _strictly_deterministic():
                self._update(inputs)
            return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).split("\n")[0][:200]
        # It came before the optimizer, so no weight has moved; if it was something else, it comes again. Not in the
        # handler, where the error would keep the attempt's activations.
        self.forgo_determinism(reason)
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], self.device)
        self._update(inputs)

    def forgo_determinism(self, reason: str) -> None:
        """Do without deterministic algorithms where there are none, and say so."""
        self._strict = False
        logger.warning(
            "%s can't be trained by deterministic algorithms alone (%s): a run that is gone on with may differ from "
            "one that wasn't stopped",
            type(self.model).__name__,
            reason,
        )

    def _update(self, inputs: StepInputs) -> None:
        """The step itself, a function of tensors that stay where they are."""
        parts = self.config.accumulate
        self.optimizer.zero_grad(set_to_none=True)
        terms = torch.zeros_like(self.sums[:-1])
        for i in range(parts):
            with self._part(last=i == parts - 1):
                values = self.loss(self._model_fn, inputs.x[i], inputs.y[i], t=inputs.t[i], noise=inputs.noise[i])
                (values["loss"].mean() / parts).backward()
            terms += torch.stack([values[name].detach().double().mean() for name in self.loss.terms]) / parts
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        self.optimizer.step()
        with torch.no_grad():
            averages, weights = ([local(one) for one in held] for held in (self._ema_parameters, self.parameters))
            self._average(averages, weights, self.optimizer.state[self.parameters[0]]["step"])
            self.sums += torch.cat([terms, norm.double().reshape(1)])

    def _part(self, *, last: bool) -> AbstractContextManager[None]:
        """What one part of a batch runs in: of several ranks, they meet at the last one alone."""
        return nullcontext() if self._parallel is None else self._parallel.accumulating(last=last)

    def _capture(self, inputs: StepInputs) -> Captured[None]:
        """Capture the step, which moves nothing."""
        try:
            warmup = WARMUP if self._parallel is None else max(WARMUP, self._parallel.warmup)
            # A sharded model gathers weights into what an earlier step made, which a watch would refuse.
            moves = [local(tensor) for tensor in self.tensors().values()] if self._sharded else None
            captured = capture(self._step, inputs, optimizer=self.optimizer, warmup=warmup, moves=moves)
        except CaptureError as error:
            raise CaptureError(f"{error}; or train with execution eager") from error
        if self.config.checkpoint_blocks and captured.draws:
            raise ValueError(
                f"{type(self.model).__name__} draws random numbers in its blocks, which a CUDA graph can't draw again "
                "in the backward pass; use execution eager, or leave out the checkpointing of blocks"
            )
        return captured


def _undetermined(config: TrainConfig) -> str | None:
    """Why a model can't be trained by deterministic algorithms alone: found on one sample, apart from any run."""
    device = torch.device(config.device)
    model, loss = config.model.build().to(device).train(), build_loss(config.loss, device=device)
    stop_dropping_labels(model)
    x = torch.zeros(1, *config.data.shape, device=device)
    t = loss.times(torch.zeros(1, dtype=torch.float64)).to(device)
    bf16 = config.dtype == "bf16"

    def run(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            return model(x, t, y)

    try:
        with _strictly_deterministic():
            loss(run, x, torch.zeros(1, dtype=torch.int64, device=device), t=t, noise=x)["loss"].mean().backward()
    except RuntimeError as error:  # that the memory doesn't take it among them
        return str(error).split("\n")[0][:200]
    return None


def build_step(
    config: TrainConfig,
    first: Mapping[str, Tensor] | None = None,
    parallel: Kind | None = None,
    sending: Sending = "collectives",
) -> TrainingStep:
    """The training step of a run, on its device.

    Args:
        config: The run.
        first: State dict of its first weights; None where they are drawn, or a checkpoint follows.
        parallel: How the ranks of the job that this process has joined share the model; None for one process.
        sending: How they send: see `dig.training.parallel.wrap`.

    Raises:
        ValueError: A pattern of names fits nothing of the model.
        MissingPackageError: Adapters need peft, which is not installed.
    """
    # PyTorch's operations on a CPU repeat themselves.
    tries = parallel is not None and config.deterministic and config.device == "cuda"
    reason = _undetermined(config) if tries else None
    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    # Made on the CPU: its generator gives the same weights on every device.
    model = config.model.build()
    if first is not None:
        model.load_state_dict(first)
    adapted = None
    if config.freeze:
        freeze(model, config.freeze)
    if config.lora:
        adapted = attach(model, rank=config.lora, targets=config.lora_targets, whole=config.lora_whole)
    # One that is sharded goes to its device share by share: all of it may not fit there.
    model = model if parallel == "fsdp" else model.to(device)
    step = TrainingStep(config, model, build_loss(config.loss, device=device), parallel, sending)
    step.adapted = adapted
    if reason is not None:
        step.forgo_determinism(reason)
    return step
