"""Processes: the sweep, its workers, the two sides of a comparison and their checkouts."""
