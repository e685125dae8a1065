"""Micro-benchmarks of single operations, and the search for their tile choices."""
