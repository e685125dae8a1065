"""Diffusion: the noise schedule, the training losses and the samplers, for any `dig.layers.Backbone`."""

from dig.diffusion.losses import FlowMatchingLoss, HybridLoss, Loss, LossName, build_loss
from dig.diffusion.schedule import Schedule, evenly_spaced_timesteps, linear_schedule

__all__ = [
    "FlowMatchingLoss",
    "HybridLoss",
    "Loss",
    "LossName",
    "Schedule",
    "build_loss",
    "evenly_spaced_timesteps",
    "linear_schedule",
]
