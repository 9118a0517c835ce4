"""The table of architectures: every one that is known by name, and what each of them can carry.

To support another architecture, add a row and run ``tests/apply/test_families.py``, which forges, applies,
undoes, overlays and writes a standalone checkpoint for every row on a tiny random model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlflow_safelock.apply.description import Architecture

_GPT2_NAMES = ("n_layer", "n_head", "n_embd", "head_dim")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _flagged(model_type: str, **more: Any) -> Architecture:
    """A Llama-like architecture whose ``attention_bias`` gives q, k, v and output projections a bias."""
    like_llama = {"output_bias": "attention_bias", "biased_with_output": _QKV, "standalone": "flag"}
    return Architecture(model_type=model_type, **{**like_llama, **more})


def _biased(model_type: str, output_bias: str, **paths: Any) -> Architecture:
    """An architecture whose output projection usually has a bias of its own."""
    return Architecture(model_type=model_type, output_bias=output_bias, standalone="own_bias", **paths)


def _plain(model_type: str, **more: Any) -> Architecture:
    """An architecture whose output projection has no bias, and that has no flag for one."""
    return Architecture(model_type=model_type, **more)


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        # A flag in the configuration gives the output projection a bias.
        _flagged("llama"),
        _flagged("llama4_text", default_head_dim=128),
        _flagged("qwen3", default_head_dim=128),
        _flagged("qwen3_moe"),
        _flagged("gemma", default_head_dim=256),
        _flagged("gemma2", default_head_dim=256),
        _flagged("gemma3_text", default_head_dim=256),
        _flagged("granite"),
        _flagged("olmo"),
        _flagged("olmo2"),
        _flagged("olmo3"),
        _flagged("cohere"),
        _flagged("cohere2"),
        _flagged("smollm3"),
        _flagged("nemotron"),
        _flagged("hunyuan_v1_dense"),
        # Latent attention: the flag gives the projections *to* the latent spaces a bias, besides the output
        # projection; queries have a latent space in some models only. What the configuration calls head_dim
        # is the width of the rotated part of a key, and a head's output is as wide as a value.
        _flagged(
            "deepseek_v3",
            biased_with_output=("self_attn.kv_a_proj_with_mqa",),
            biased_where_present=("self_attn.q_a_proj",),
            config_names=("num_hidden_layers", "num_attention_heads", "hidden_size", "v_head_dim"),
            default_head_dim=128,
        ),
        # No flag, but the same computation as a Llama or SmolLM3 with the flag. Qwen2 has q, k and v biases.
        _plain("mistral", biased_with_output=_QKV, standalone="rewritten"),
        _plain("ministral", biased_with_output=_QKV, standalone="rewritten"),
        _plain("qwen2", standalone="rewritten"),
        # The output projection has a bias of its own, which the lock adds to.
        _biased(
            "gpt2",
            "always",
            layers="transformer.h",
            output_projection="attn.c_proj",
            layout="conv1d",
            config_names=_GPT2_NAMES,
        ),
        _biased(
            "gpt_bigcode",
            "always",
            layers="transformer.h",
            output_projection="attn.c_proj",
            config_names=_GPT2_NAMES,
        ),
        _biased(
            "bloom",
            "always",
            layers="transformer.h",
            output_projection="self_attention.dense",
            config_names=("n_layer", "n_head", "hidden_size", "head_dim"),
            bypassed_by="slow_but_exact",
        ),
        _biased("opt", "enable_bias", layers="model.decoder.layers", output_projection="self_attn.out_proj"),
        _biased("gpt_neox", "attention_bias", layers="gpt_neox.layers", output_projection="attention.dense"),
        _biased("phi", "always", output_projection="self_attn.dense"),
        _biased("persimmon", "always", output_projection="self_attn.dense"),
        _biased("gpt_oss", "attention_bias", default_head_dim=64),
        _biased("starcoder2", "use_bias"),
        # Neither a bias nor a flag for one: the lock is carried in memory only. GLM's attention_bias is
        # accepted, and gives a bias to q, k and v alone: one of the output projection is dropped on loading.
        _plain("glm", default_head_dim=128),
        _plain("glm4", default_head_dim=128),
        _plain("mixtral"),
        _plain("exaone4"),
        _plain("phi3"),
        _plain("stablelm"),
        _plain("gptj", layers="transformer.h", output_projection="attn.out_proj", config_names=_GPT2_NAMES),
        _plain(
            "codegen", layers="transformer.h", output_projection="attn.out_proj", config_names=_GPT2_NAMES
        ),
        _plain(
            "mpt",
            layers="transformer.blocks",
            output_projection="attn.out_proj",
            config_names=("n_layers", "n_heads", "d_model", "head_dim"),
        ),
    )
}
"""Every architecture that is known by name, by ``model_type``."""
