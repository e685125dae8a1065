"""Whole numbers on the host: Triton's own helpers are made for kernels too, and take microseconds a call there."""

from __future__ import annotations


def ceil_div(a: int, b: int) -> int:
    """The least whole number that is at least a / b."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n, which is 1 or more."""
    return 1 << (int(n) - 1).bit_length()
