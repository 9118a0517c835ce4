"""How many tokens a model can read at all: one with a table of positions ends where the table does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLES = ("wpe", "embed_positions", "position_embedding", "position_embeddings", "positions_embed")
"""What modules call a table of positions, learned (GPT-2, OPT, BERT) or worked out beforehand (GPT-J)."""


def position_limit(model: PreTrainedModel) -> int | None:
    """Most tokens that a model can read at once, or ``None``.

    Rotary positions are worked out for as many tokens as come, so such a model has no limit of this kind,
    whatever length it was trained for.
    """
    limit = _limit_of_tables(model)
    if limit is None:
        return None
    adapter: Any = getattr(model, "active_peft_config", None)
    # Tuned prompts come before the tokens.
    before: int = adapter.num_virtual_tokens if getattr(adapter, "is_prompt_learning", False) else 0
    return limit - before


def _limit_of_tables(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config(decoder=True)
    if config.model_type == "mpt":
        return int(config.max_seq_len)  # it has no table, and adds distances of so many tokens
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return None
    # The decoder alone: a tower of images beside it, or a smaller one in it, has a table of its own.
    modules = getattr(model, "get_decoder", lambda: model)().modules()
    found = [getattr(module, name, None) for module in modules for name in TABLES]
    tables = [table for table in found if isinstance(table, nn.Embedding | torch.Tensor)]
    whole = [table for table in tables if _rows(table) >= limit]
    return limit - max(map(rows_of_padding, whole)) if whole else None


def _rows(table: nn.Embedding | torch.Tensor) -> int:
    return table.num_embeddings if isinstance(table, nn.Embedding) else table.shape[0]


def rows_of_padding(table: nn.Module | torch.Tensor) -> int:
    """How many rows of a table of positions no token ever has.

    Models of RoBERTa's line give padding a row, and count from the row after it: in ``transformers`` their
    table is made with a ``padding_idx``, and in no other line.
    """
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else 1 + int(padding)
