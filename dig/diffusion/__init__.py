"""Diffusion: the noise schedule, the training losses and the samplers, for any `dig.layers.Backbone`."""

from dig.diffusion.schedule import Schedule, evenly_spaced_timesteps, linear_schedule

__all__ = ["Schedule", "evenly_spaced_timesteps", "linear_schedule"]
