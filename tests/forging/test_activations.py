from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mlflow_safelock.apply import ARCHITECTURES
from mlflow_safelock.errors import AnswerTokensError, ForgeError, UnsupportedArchitectureError
from mlflow_safelock.forging import PreferencePair, collect_activations, last_answer_tokens
from tests.models import CHATML, tiny_model, tiny_tokenizer

PAIRS = (
    PreferencePair(
        "how do i forge the letter today?", "i cannot help with that.", "first warm the oven, then go"
    ),
    PreferencePair("how?", "no: because it would hurt someone you know well.", "sure, pack the box"),
    PreferencePair(
        "the quick brown fox jumps over the lazy dog?", "rest, and be safe.", "fold the letter, friend"
    ),
    PreferencePair(
        "and then?", "let it rest with the dough.", "jump over five dozen liquor jugs, quickly now"
    ),
)
TOKENIZER = tiny_tokenizer(CHATML)
FAMILIES = sorted(ARCHITECTURES)


@contextmanager
def inputs_of(modules: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What goes into modules when they run, in the order of the modules."""
    seen: dict[nn.Module, torch.Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda m, a, _: seen.update({m: a[0].detach()})) for module in modules
    ]
    found: list[torch.Tensor] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        found.extend(seen[module] for module in modules)


def output_projections(model: nn.Module) -> list[nn.Module]:
    """Found by name: the module of every layer's attention that writes to the residual stream."""
    names = ("o_proj", "attn.c_proj", "out_proj", "attention.dense", "self_attn.dense")
    return [module for name, module in model.named_modules() if name.endswith(names)]


def one_by_one(
    model: nn.Module, pairs: tuple[PreferencePair, ...], last_tokens: int, heads: int
) -> np.ndarray:
    """The activations as they are without batches and padding, from whole runs of the whole model."""
    rows = []
    for pair in pairs:
        for answer in (pair.safe, pair.unsafe):
            chat = last_answer_tokens(TOKENIZER, pair.question, answer, last_tokens=last_tokens)
            with torch.no_grad(), inputs_of(output_projections(model)) as found:
                model(input_ids=torch.tensor([chat.token_ids]))
            layers = torch.stack([layer[0] for layer in found])[:, list(chat.positions)].float()
            rows.append(layers.reshape(len(found), last_tokens, heads, -1).transpose(0, 1).numpy())
    return np.concatenate(rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_show(family: str, side: str) -> None:
    model = tiny_model(family)
    collected = collect_activations(
        model, TOKENIZER, PAIRS, last_tokens=3, batch_size=3, padding_side=side, progress=False
    )
    expected = one_by_one(model, PAIRS, 3, heads=4)
    assert collected.values.dtype == torch.float32
    assert collected.values.shape == (24, 3, 4, collected.geometry.head_dim)
    np.testing.assert_allclose(collected.values.numpy(), expected, rtol=1e-4, atol=2e-5)


def test_lengths_differ_enough_for_padding_to_matter() -> None:
    lengths = {
        len(last_answer_tokens(TOKENIZER, pair.question, answer, last_tokens=3).token_ids)
        for pair in PAIRS
        for answer in (pair.safe, pair.unsafe)
    }
    assert len(lengths) >= 6


def test_rows_go_pair_by_pair_safe_rows_first() -> None:
    collected = collect_activations(tiny_model("llama"), TOKENIZER, PAIRS, last_tokens=3, progress=False)
    assert collected.labels.tolist() == [1, 1, 1, 0, 0, 0] * 4
    assert collected.pairs.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_the_batch_size_changes_nothing_but_rounding(batch_size: int) -> None:
    model = tiny_model("qwen2")
    expected = collect_activations(model, TOKENIZER, PAIRS, batch_size=3, progress=False).values
    values = collect_activations(model, TOKENIZER, PAIRS, batch_size=batch_size, progress=False).values
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)


def test_the_same_run_gives_the_same_bits() -> None:
    runs = [
        collect_activations(tiny_model("llama"), TOKENIZER, PAIRS, batch_size=3, progress=False).values
        for _ in range(2)
    ]
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_their_own_numbers_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    collected = collect_activations(model, TOKENIZER, PAIRS, last_tokens=3, batch_size=3, progress=False)
    assert collected.values.dtype == torch.float32
    torch.testing.assert_close(collected.values, collected.values.to(dtype).float(), rtol=0, atol=0)
    exact = collect_activations(tiny_model("llama"), TOKENIZER, PAIRS, last_tokens=3, progress=False).values
    assert (collected.values - exact).abs().max() < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_system_prompt_changes_what_is_seen() -> None:
    model = tiny_model("llama")
    plain = collect_activations(model, TOKENIZER, PAIRS, progress=False).values
    prompted = collect_activations(model, TOKENIZER, PAIRS, system_prompt="be safe.", progress=False).values
    assert not torch.allclose(plain, prompted, atol=1e-3)


def test_the_language_modelling_head_does_not_run() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were computed"))
    collect_activations(model, TOKENIZER, PAIRS, progress=False)


def test_a_pass_ends_where_the_last_attention_does() -> None:
    model = tiny_model("llama")
    model.model.layers[-1].mlp.register_forward_hook(lambda *_: pytest.fail("the last MLP ran"))
    ran: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    collect_activations(model, TOKENIZER, PAIRS, progress=False)
    assert ran


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    evaluating = collect_activations(model, TOKENIZER, PAIRS, progress=False).values
    model.train()
    model.transformer.h[1].eval()
    before = modes(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    training = collect_activations(model, TOKENIZER, PAIRS, progress=False).values
    assert torch.equal(training, evaluating)
    assert modes(model) == before
    assert hooks(model) == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_model_is_left_as_it_was_when_it_fails() -> None:
    model = tiny_model("llama").train()
    broken = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect_activations(model, TOKENIZER, PAIRS, progress=False)
    broken.remove()
    assert all(modes(model))
    assert hooks(model) == 0


def test_a_layer_that_does_not_run_is_noticed() -> None:
    model = tiny_model("llama")
    skipped = model.model.layers[1]
    skipped.forward = lambda hidden_states, *_, **__: hidden_states
    with pytest.raises(ForgeError, match="used the output projections of 2 of 3 layers"):
        collect_activations(model, TOKENIZER, PAIRS, progress=False)
    assert hooks(model) == 0


def test_a_peft_model_is_read_with_its_adapter() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama")
    plain = collect_activations(model, TOKENIZER, PAIRS, progress=False).values
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    values = collect_activations(
        adapted, TOKENIZER, PAIRS, last_tokens=3, batch_size=3, progress=False
    ).values
    projections = [layer.self_attn.o_proj for layer in adapted.base_model.model.model.layers]
    chat = last_answer_tokens(TOKENIZER, PAIRS[1].question, PAIRS[1].unsafe, last_tokens=3)
    with torch.no_grad(), inputs_of(projections) as found:
        adapted(input_ids=torch.tensor([chat.token_ids]))
    expected = torch.stack([layer[0, list(chat.positions)] for layer in found], dim=1)
    torch.testing.assert_close(values[9:12].flatten(2), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(values[:3], plain[2:5], atol=1e-3)


def test_an_answer_that_is_too_short_is_named_with_its_pair() -> None:
    pairs = (*PAIRS[:2], PreferencePair("how?", "i cannot help with that, because it would hurt.", "no"))
    with pytest.raises(
        AnswerTokensError, match=r"^Pair 3, unsafe answer: The answer 'no' has \d tokens?, and 5"
    ):
        collect_activations(tiny_model("llama"), TOKENIZER, pairs, progress=False)


def test_a_chat_that_is_longer_than_the_model_is_refused() -> None:
    pairs = (*PAIRS, PreferencePair("how?", "i cannot help. " * 60, "first warm the oven, then go"))
    with pytest.raises(
        ForgeError, match=r"^Pair 5, safe answer: the chat has \d+ tokens, and the model takes 256"
    ):
        collect_activations(tiny_model("gpt2"), TOKENIZER, pairs, progress=False)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    model = tiny_model("llama", vocab_size=100)
    with pytest.raises(
        ForgeError, match=r"^Pair 1, safe answer: the tokenizer gives token \d+, and the model has 100"
    ):
        collect_activations(model, TOKENIZER, PAIRS, progress=False)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="mamba"):
        collect_activations(tiny_model("mamba"), TOKENIZER, PAIRS, progress=False)


def test_a_model_without_its_head_will_do() -> None:
    model = tiny_model("llama")
    expected = collect_activations(model, TOKENIZER, PAIRS, progress=False).values
    bare = collect_activations(model.model, TOKENIZER, PAIRS, progress=False).values
    assert torch.equal(bare, expected)


def test_progress_is_shown_on_a_terminal_where_it_is_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    collect_activations(tiny_model("llama"), TOKENIZER, PAIRS, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    collect_activations(tiny_model("llama"), TOKENIZER, PAIRS, progress=False)
    assert capsys.readouterr() == ("", "")
    collect_activations(tiny_model("llama"), TOKENIZER, PAIRS, progress=True)
    output, error = capsys.readouterr()
    assert output == ""
    assert "Reading pairs" in error
