"""How fast models sample: the whole loop over a sampler's steps, models in turns, a row a model and resolution."""
