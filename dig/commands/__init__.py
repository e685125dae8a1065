"""The commands of ``python -m dig``."""
