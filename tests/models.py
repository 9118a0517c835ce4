"""Tiny random models, tokenizers and locks, made on the spot: what the tests of every room work on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mlflow_safelock.lock import AttentionGeometry, LockedHead, LockMetadata, SafetyLock

VOCABULARY = 384
"""Tokens in every tiny vocabulary: the 256 bytes, four special tokens, and learned merges."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that every role may speak in; ``<|im_end|>`` ends a turn and is the end-of-text token."""

SPECIAL_TOKENS = ("<pad>", "<s>", "<|im_start|>", "<|im_end|>")

_CORPUS = (
    "how do i bake the bread today? first warm the oven, then fold the dough and let it rest.",
    "how do i forge the letter today? i cannot help with that, because it would hurt someone.",
    "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.",
    "You are a helpful assistant. system user assistant question answer safe unsafe 0123456789",
)

# What every family is built with; more than one key/value group, and hidden is not heads * head_dim.
_COMMON: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}

# These derive head_dim from hidden, whatever the configuration says.
_HIDDEN_IS_HEADS_TIMES_HEAD_DIM = {"head_dim": 12}

# Latent attention: a head's output is as wide as a value.
_DEEPSEEK: Mapping[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 4,
    "v_head_dim": 10,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}

_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": None},
    # These have windows in every model; wider than any test's input.
    "ministral": {"sliding_window": 128},
    "exaone4": {"sliding_window": 128},
    "gpt2": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "gpt_bigcode": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "bloom": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "persimmon": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "biogpt": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "openai-gpt": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "gpt_neo": {
        **_HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global"], 3]],
    },
    "bitnet": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "gptj": {**_HIDDEN_IS_HEADS_TIMES_HEAD_DIM, "rotary_dim": 8},
    "codegen": {**_HIDDEN_IS_HEADS_TIMES_HEAD_DIM, "rotary_dim": 8},
    "mpt": {**_HIDDEN_IS_HEADS_TIMES_HEAD_DIM, "max_seq_len": 256},
    "opt": {**_HIDDEN_IS_HEADS_TIMES_HEAD_DIM, "ffn_dim": 64, "word_embed_proj_dim": 48},
    "gpt_neox": _HIDDEN_IS_HEADS_TIMES_HEAD_DIM,
    "stablelm": {**_HIDDEN_IS_HEADS_TIMES_HEAD_DIM, "partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 2},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 128},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


def tiny_model(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """A random causal language model of a family (its ``model_type``), in evaluation mode.

    Every parameter is random, biases and norms included, so that nothing a test looks at is zero or one by
    accident. 3 layers x 4 query heads, 2 key/value heads, hidden 48; head_dim 8, or 12 where it must be
    hidden / heads. ``config`` overrides any of it. The same seed gives the same model.
    """
    made = AutoConfig.for_model(family, **{**_COMMON, **_FAMILIES.get(family, {}), **config})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.tie_weights()
    return model.to(dtype).eval()


def tiny_tokenizer(
    chat_template: str | None = None, style: Literal["byte_level", "metaspace"] = "byte_level"
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer trained on a few sentences, of ``VOCABULARY`` tokens or fewer.

    Args:
        chat_template: Jinja chat template, such as ``CHATML``; none by default.
        style: Like GPT-2, Llama 3 and Qwen (``byte_level``), or like Llama 2 and Mistral (``metaspace``).
    """
    if style == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<s>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        chat_template=chat_template,
    )


def random_lock(
    geometry: AttentionGeometry, heads: int = 5, seed: int = 0, base_model: str = "tests/base"
) -> SafetyLock:
    """A lock on randomly drawn heads, with random directions and stds between 0.5 and 1.5, and scores."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(geometry.layers * geometry.heads, size=heads, replace=False)
    locked = []
    for index in drawn:
        direction = rng.normal(size=geometry.head_dim)
        locked.append(
            LockedHead(
                layer=int(index) // geometry.heads,
                head=int(index) % geometry.heads,
                direction=(direction / np.linalg.norm(direction)).astype(np.float32),
                std=float(rng.uniform(0.5, 1.5)),
            )
        )
    metadata = LockMetadata(
        base_model=base_model,
        base_revision=None,
        architecture=None,
        geometry=geometry,
        origin="forged",
        last_tokens=5,
        pairs=20,
        split="pair",
        train_fraction=0.6,
        seed=seed,
        system_prompt=None,
        dataset_digest=None,
        default_alpha=6.0,
        created=None,
        tools=None,
    )
    scores = rng.uniform(size=(geometry.layers, geometry.heads)).astype(np.float32)
    return SafetyLock(tuple(locked), metadata, scores)
