"""DiG: diffusion models with gated linear attention (arXiv 2405.18428): model, operations, checkpoints."""

__version__ = "0.1.0"
