"""Versions of the software that locks models."""

from __future__ import annotations

import importlib.metadata
from functools import cache

TOOLS = ("mlflow-safelock", "mlflow", "transformers", "torch")
"""The packages whose versions a receipt states."""


@cache
def installed_version(package: str) -> str:
    """Version of an installed package; looked up once, since that reads and parses files."""
    return importlib.metadata.version(package)


def tool_versions() -> dict[str, str]:
    """Version of each of ``TOOLS``."""
    return {name: installed_version(name) for name in TOOLS}
