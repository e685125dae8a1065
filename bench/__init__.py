"""The benchmark: models by name, cases, measuring, results."""
