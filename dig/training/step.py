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
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from dig.diffusion import Loss
from dig.layers import Backbone, LabelEmbedder
from dig.model import DiG
from dig.training.config import TrainConfig
from dig.training.inputs import StepInputs

logger = logging.getLogger(__name__)

WARMUP_STEPS = 3
"""Steps that run before a graph is captured, so that every kernel is compiled and every buffer there."""

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

    A block is a member of a `ModuleList` whose name ends in ``blocks``, or a module whose name ends in ``block``.

    Args:
        model: Parameters keep their names. Its blocks' ``forward`` is replaced; of DiG on this project's kernels,
            which doesn't call them, they are marked for `dig.raster`.
        preserve_rng_state: Whether blocks draw random numbers, which must be the same the second time.

    Returns:
        How many blocks there are.

    Raises:
        ValueError: The model has none.
    """
    if isinstance(model, DiG) and model.config.backend == "triton":
        from dig.raster import recompute_blocks  # here, because it takes triton

        recompute_blocks(model.blocks)
        return len(model.blocks)
    blocks: list[nn.Module] = []
    for name, child in model.named_children():
        if name.endswith("blocks") and isinstance(child, nn.ModuleList):
            blocks += list(child)
        elif name.endswith("block"):
            blocks.append(child)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks whose activations could be left out")
    for block in blocks:
        block.forward = _checkpointed(block.forward, preserve_rng_state)
    return len(blocks)


def _checkpointed(forward: Callable[..., Any], preserve_rng_state: bool) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    return run


class TrainingStep:
    """A model in training: its weights, their moving average, the optimizer, and the step that moves them on.

    Args:
        config: The run.
        model: On its device, with its first weights. Its own dropping of labels is turned off: inputs come with
            labels dropped already.
        loss: With its constants on the device.

    Attributes:
        ema: The model with averaged weights, in eval mode.
        sums: (terms + 1,) fp64 sums over steps of the loss's terms and of the gradient's norm.
    """

    def __init__(self, config: TrainConfig, model: Backbone, loss: Loss) -> None:
        self.config = config
        self.model = model
        self.loss = loss
        self.device = next(model.parameters()).device
        for module in model.modules():
            if isinstance(module, LabelEmbedder):
                module.dropout = 0.0
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        model.train()
        if config.checkpoint_blocks:
            checkpoint_blocks(model, preserve_rng_state=config.execution != "graph")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._ema_parameters = [
            average
            for average, parameter in zip(self.ema.parameters(), model.parameters(), strict=True)
            if parameter.requires_grad
        ]
        self._average = get_ema_multi_avg_fn(config.ema)
        graph = config.execution == "graph"
        # A graph reads the learning rate where it lies; a tensor elsewhere would cost an eager step a wait.
        self._rate = torch.zeros((), device=self.device) if graph else None
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self._rate if self._rate is not None else config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
            capturable=graph,
        )
        # AdamW makes its state at the first step; made now, it can be loaded, and a graph finds it in place.
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=self.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self.sums = torch.zeros(len(loss.terms) + 1, dtype=torch.float64, device=self.device)
        self._network: Callable[..., Tensor] = torch.compile(model) if config.execution == "compile" else model
        self._inputs: StepInputs | None = None
        self._graph: Any = None
        self._strict = config.deterministic
        self._tried = False

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
        """Do one step."""
        if self._rate is None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self._inputs = inputs.to(self.device)
            self._step()
            return
        if self._graph is None:
            self._inputs = inputs.to(self.device)
            self._capture()
        else:
            assert self._inputs is not None
            self._inputs.copy_(inputs)
        self._rate.fill_(learning_rate)
        self._graph.replay()

    def _model_fn(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        bf16 = self.config.dtype == "bf16"
        with torch.autocast(self.device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            return self._network(x, t, y)

    def _step(self) -> None:
        """One step, by deterministic algorithms alone if the first one shows that this model can be trained so."""
        if not self._strict:
            self._update()
            return
        if self._tried:
            with _strictly_deterministic():
                self._update()
            return
        self._tried = True
        cuda = self.device.type == "cuda"
        random = torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None
        try:
            with _strictly_deterministic():
                self._update()
            return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).split("\n")[0][:200]
        # It came before the optimizer, so no weight has moved; if it was something else, it comes again. Not in the
        # handler, where the error would keep the attempt's activations.
        self._strict = False
        torch.set_rng_state(random[0])
        if random[1] is not None:
            torch.cuda.set_rng_state(random[1], self.device)
        self._update()
        logger.warning(
            "%s can't be trained by deterministic algorithms alone (%s): a run that is gone on with may differ from "
            "one that wasn't stopped",
            type(self.model).__name__,
            reason,
        )

    def _update(self) -> None:
        """The step itself, a function of tensors that stay where they are."""
        inputs, parts = self._inputs, self.config.accumulate
        assert inputs is not None
        self.optimizer.zero_grad(set_to_none=True)
        terms = torch.zeros_like(self.sums[:-1])
        for i in range(parts):
            values = self.loss(self._model_fn, inputs.x[i], inputs.y[i], t=inputs.t[i], noise=inputs.noise[i])
            (values["loss"].mean() / parts).backward()
            terms += torch.stack([values[name].detach().double().mean() for name in self.loss.terms]) / parts
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.config.clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        self.optimizer.step()
        with torch.no_grad():
            self._average(self._ema_parameters, self.parameters, 0)
            self.sums += torch.cat([terms, norm.double().reshape(1)])

    def _capture(self) -> None:
        """Capture the step. Running it first moves the weights; they are put back."""
        before = {name: tensor.to("cpu", copy=True) for name, tensor in self.tensors().items()}
        random = torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), warnings.catch_warnings():
            # The optimizer remarks that it is made for graphs and runs without one: here it should.
            warnings.filterwarnings("ignore", message=".*capturable=True.*")
            for _ in range(WARMUP_STEPS):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        if self.config.checkpoint_blocks and not torch.equal(random, torch.cuda.get_rng_state(self.device)):
            raise ValueError(
                f"{type(self.model).__name__} draws random numbers in its blocks, which a CUDA graph can't draw again "
                "in the backward pass; use execution eager, or leave out the checkpointing of blocks"
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        # The thread that makes the next inputs pins memory meanwhile, which the default mode forbids every thread.
        # And on the stream of the first steps, for cuBLAS keeps a workspace for each stream that it has run on.
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._step()
        self.load(before)
        torch.cuda.set_rng_state(random, self.device)
