"""The parity check: what must hold before a number counts. A case that fails it is an error row, not a number.

The model computes what its reference computes; all models of a comparison are given the same; the kernels that the case
is named after are the ones that ran.
"""
