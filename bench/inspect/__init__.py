"""Where a step's time and memory go: kernels, timeline, profile, roofline, capacity."""
