"""How good samples are: distances between sets of features, and what makes the features."""
