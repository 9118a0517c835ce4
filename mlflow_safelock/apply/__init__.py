"""Lock and model together: where the heads are, the arithmetic, in memory, and on disk.

The names below load what they need when they are first used: the table of architectures can be asked without
importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow_safelock.apply.architectures import (
        ARCHITECTURES,
        Architecture,
        Attention,
        architecture_of,
        attention_of,
        geometry_from_config,
    )
    from mlflow_safelock.apply.checkpoint import CheckpointReport, save_locked_checkpoint
    from mlflow_safelock.apply.comparison import Comparison, compare
    from mlflow_safelock.apply.described import register_architecture
    from mlflow_safelock.apply.displacement import Displacement, base_biases, displacements, output_bias
    from mlflow_safelock.apply.generation import Answer, generate, render_prompt
    from mlflow_safelock.apply.in_memory import LockHandle, apply_lock, handle_of

_HOMES = {
    "ARCHITECTURES": "architectures",
    "Answer": "generation",
    "Architecture": "architectures",
    "Attention": "architectures",
    "CheckpointReport": "checkpoint",
    "Comparison": "comparison",
    "Displacement": "displacement",
    "LockHandle": "in_memory",
    "apply_lock": "in_memory",
    "base_biases": "displacement",
    "architecture_of": "architectures",
    "attention_of": "architectures",
    "compare": "comparison",
    "displacements": "displacement",
    "generate": "generation",
    "geometry_from_config": "architectures",
    "handle_of": "in_memory",
    "output_bias": "displacement",
    "register_architecture": "described",
    "render_prompt": "generation",
    "save_locked_checkpoint": "checkpoint",
}

__all__ = [
    "ARCHITECTURES",
    "Answer",
    "Architecture",
    "Attention",
    "CheckpointReport",
    "Comparison",
    "Displacement",
    "LockHandle",
    "apply_lock",
    "architecture_of",
    "attention_of",
    "base_biases",
    "compare",
    "displacements",
    "generate",
    "geometry_from_config",
    "handle_of",
    "output_bias",
    "register_architecture",
    "render_prompt",
    "save_locked_checkpoint",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
