"""Models by name, as scripts import them: ``from bench.models import create_model``. `dig.registry` has the names."""

from __future__ import annotations

from dig.registry import families, list_models
from dig.spec import create_model

__all__ = ["create_model", "families", "list_models"]
