"""Verdicts: statistics over launches, comparison of rows, the regression gate."""
