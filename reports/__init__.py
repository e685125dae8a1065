"""Figures and tables, drawn from stored result rows alone."""
