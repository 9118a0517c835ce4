"""A toy is trained under disturbances that leave no trace on the model."""

from __future__ import annotations

import torch

from mlflow_safelock.demo.world import make_tokenizer
from mlflow_safelock.toys import disturbed_heads, new_llama


def test_heads_are_disturbed_for_a_while_only() -> None:
    model = new_llama(make_tokenizer(), layers=1, heads=16, key_value_heads=8, positions=64, seed=0)
    tokens = torch.arange(4, 12)[None]
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        with disturbed_heads(model, noise=1.0, dropout=0.5):
            first, second = (model(input_ids=tokens).logits for _ in range(2))
        after = model(input_ids=tokens).logits
    assert torch.equal(before, after)
    assert not torch.allclose(first, before)
    assert not torch.allclose(first, second)


def test_noise_is_one_displacement_for_all_tokens_of_a_text() -> None:
    model = new_llama(make_tokenizer(), layers=1, heads=16, key_value_heads=8, positions=64, seed=0)
    projection, seen = model.model.layers[0].self_attn.o_proj, []
    outputs = torch.ones(3, 7, projection.in_features)
    torch.manual_seed(0)
    with disturbed_heads(model, noise=0.5, dropout=0.5):
        hook = projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        projection(outputs)
        hook.remove()
    (disturbed,) = seen
    for text in disturbed:
        kept = [column[column != 0.0] for column in text.T]
        assert all(torch.equal(column, column[:1].expand_as(column)) for column in kept if len(column))
    assert not torch.equal(disturbed[0], disturbed[1])
