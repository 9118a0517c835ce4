"""Keeping a tokenizer what it is when the configuration beside it changes.

``AutoTokenizer`` chooses a class by the model's configuration as well as by the tokenizer's own, so the same
files can load as another tokenizer once a Mistral is written as a Llama, or once a tokenizer that MLflow kept
apart lies beside a ``config.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mlflow_safelock.apply.checkpoint.layout import Layout
from mlflow_safelock.apply.checkpoint.weights import read_object
from mlflow_safelock.errors import CheckpointError

_PROBES = (
    "How do I bake bread?",
    "  two spaces,\n\ta tab; 3.14159 and 2,000 naïve façades in 東京 🍞",
    "<s></s><|im_start|>user\nhello<|im_end|>[INST] yes [/INST]",
)


def keep_tokenizer(layout: Layout, folder: Path) -> None:
    """Make ``AutoTokenizer`` load from ``folder`` the very tokenizer that the source loads.

    Args:
        layout: The source's files, with a tokenizer among them.
        folder: The complete locked checkpoint; its ``tokenizer_config.json`` may be changed.

    Raises:
        CheckpointError: One of them cannot be loaded, or they are not the same tokenizer.
    """
    original = _load_original(layout)
    path = folder / "tokenizer_config.json"
    settings = {**read_object(path), "tokenizer_class": type(original).__name__}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    carried = _loaded(AutoTokenizer, folder)
    if _behaviour(carried) != _behaviour(original):
        raise CheckpointError(
            f"The tokenizer of {layout.tokenizer} would be another one in a locked checkpoint, where the "
            f"configuration differs: {type(original).__name__} becomes {type(carried).__name__}, or splits "
            "text another way.",
            next_step="Lock the model in memory (apply_lock), or promote it with the overlay carrier.",
        )


def _load_original(layout: Layout) -> Any:
    loader = getattr(transformers, layout.tokenizer_class or "", None)
    is_tokenizer = isinstance(loader, type) and issubclass(loader, PreTrainedTokenizerBase)
    return _loaded(loader if is_tokenizer else AutoTokenizer, layout.tokenizer)


def _loaded(loader: Any, folder: Path | None) -> Any:
    try:
        return loader.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers have their own ways to reject files
        raise CheckpointError(
            f"The tokenizer of {folder} cannot be loaded: {error}",
            next_step="Save the tokenizer again with save_pretrained.",
        ) from error


def _behaviour(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return {
        "rules": None if backend is None else backend.to_str(),
        "chat template": tokenizer.chat_template,
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "probes": [tokenizer(text)["input_ids"] for text in _PROBES],
        "plain probes": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _PROBES],
    }
