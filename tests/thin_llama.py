"""Llamas with the attention of large models and next to nothing else, of made weights, quickly."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from mlflow_safelock.lock import AttentionGeometry
from tests.models import VOCABULARY

LLAMA_3_8B = AttentionGeometry(layers=32, heads=32, head_dim=128, hidden=4096)
"""Attention shape of the Llama 3 models of 8 B parameters; they have 8 key/value heads."""

_LEAST_POOL = 1 << 16
"""Fewest random numbers that weights are cut from."""

_STRIDE = 1_299_709
"""How far apart two parameters' first numbers are in the pool: a prime, so that no two are alike."""


def thin_llama(
    geometry: AttentionGeometry,
    *,
    key_value_heads: int,
    intermediate: int = 64,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> LlamaForCausalLM:
    """A Llama with this attention and, if nothing else is said, a thin MLP and a tiny vocabulary.

    Every matrix is another stretch of one pool of normal random numbers, at another scale around
    ``fan_in ** -0.5``, so that no two columns of any two output projections are the same, and making the
    weights takes little longer than writing them.

    Args:
        geometry: Its attention shape.
        key_value_heads: Number of key/value heads.
        intermediate: Width of the MLP.
        vocabulary: Number of tokens; no fewer than the tests' tokenizer has.
        dtype: Dtype of all parameters.
        seed: Seed of the pool.
    """
    config = LlamaConfig(
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=key_value_heads,
        head_dim=geometry.head_dim,
        hidden_size=geometry.hidden,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
        tie_word_embeddings=False,
    )
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    fill(model, seed)
    return model.eval()


@torch.no_grad()
def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Overwrite every parameter of a module with made weights: matrices random, vectors one.

    Parameters on the meta device, which hold nothing, stay as they are.

    Args:
        model: The module.
        seed: Seed of the pool of random numbers.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.device.type != "meta"]
    numbers = max(_LEAST_POOL, 2 * max(parameter.numel() for parameter in parameters))
    pool = torch.randn(numbers, generator=torch.Generator().manual_seed(seed)).to(parameters[0].dtype)
    for number, parameter in enumerate(parameters):
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        start = number * _STRIDE % (numbers - parameter.numel())
        parameter.copy_(pool[start : start + parameter.numel()].view(parameter.shape))
        parameter.mul_((0.8 + 0.013 * (number % 37)) * parameter.shape[-1] ** -0.5)
