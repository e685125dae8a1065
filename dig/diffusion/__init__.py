"""Diffusion: the noise schedule, the training losses and the samplers, for any `dig.layers.Backbone`."""

from dig.diffusion.losses import FlowMatchingLoss, HybridLoss, Loss, LossName, build_loss
from dig.diffusion.noise import initial_noise, step_noise, training_noise
from dig.diffusion.samplers import Denoiser, NotFiniteError, SamplingLoop, check_finite, sample
from dig.diffusion.schedule import Schedule, evenly_spaced_timesteps, linear_schedule
from dig.diffusion.solvers import SamplerName, Solver, build_solver

__all__ = [
    "Denoiser",
    "FlowMatchingLoss",
    "HybridLoss",
    "Loss",
    "LossName",
    "NotFiniteError",
    "SamplerName",
    "SamplingLoop",
    "Schedule",
    "Solver",
    "build_loss",
    "build_solver",
    "check_finite",
    "evenly_spaced_timesteps",
    "initial_noise",
    "linear_schedule",
    "sample",
    "step_noise",
    "training_noise",
]
