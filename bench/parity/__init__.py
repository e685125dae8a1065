"""The parity check: what must hold before a number counts. A case that fails it is an error row, not a number.

The model computes what its reference computes. All models of a comparison get the same inputs. The named kernels ran.
"""
