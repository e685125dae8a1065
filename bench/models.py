"""Models by name, as scripts import them: ``from bench.models import create_model``. All of it is in `dig.registry`."""

from __future__ import annotations

from dig.registry import create_model, families, list_models

__all__ = ["create_model", "families", "list_models"]
