"""What is wrong with a file of claims, in one line."""

from __future__ import annotations


class ClaimError(ValueError):
    """Claims that cannot be read or tested; the message names the file, the claim and what to write instead."""
