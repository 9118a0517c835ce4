"""Perplexity, divergence and distinctness are what their definitions say, whatever the batches are."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model

from mlflow_safelock.apply import apply_lock, handle_of, render_prompt
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate.answers import distinct
from mlflow_safelock.evaluate.fluency import divergences, next_token_divergences, surprises
from tests.apply.conftest import lock_for
from tests.models import CHATML, tiny_model, tiny_tokenizer

TEXTS = [
    ("", "the quick brown fox"),
    ("how do i bake", "first warm the oven, then fold the dough"),
    ("", "pack my box with five dozen liquor jugs; " * 3),
]


def log_probabilities(model, tokens: list[int]) -> torch.Tensor:
    """``[tokens, vocabulary]`` in float64, one text alone."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_surprise_is_the_mean_negative_log_likelihood_of_the_text_alone(family, batch_size):
    model, tokenizer = tiny_model(family), tiny_tokenizer(CHATML)
    found = surprises(model, tokenizer, TEXTS, batch_size=batch_size)
    for (prompt, text), value in zip(TEXTS, found, strict=True):
        before = (
            tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
            if prompt
            else []
        )
        tokens = [*before, *tokenizer(text, add_special_tokens=not prompt)["input_ids"]]
        scores = log_probabilities(model, tokens)
        counted = range(max(1, len(before)), len(tokens))
        expected = -sum(scores[place - 1, tokens[place]].item() for place in counted) / len(counted)
        assert value == pytest.approx(expected, rel=1e-4)


def test_tuned_prompts_before_a_text_are_none_of_its_tokens():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(CHATML)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7)
    tuned = get_peft_model(model, settings).eval()
    text, prompt = "how do i bake the bread today?", "how do i bake?"
    tokens = tokenizer(text)["input_ids"]
    scores = log_probabilities(tuned, tokens)[-len(tokens) :]
    expected = -sum(scores[place - 1, tokens[place]].item() for place in range(1, len(tokens)))
    assert surprises(tuned, tokenizer, [("", text)]) == [
        pytest.approx(expected / (len(tokens) - 1), rel=1e-4)
    ]
    lock = lock_for(model)
    (value,) = next_token_divergences(tuned, tokenizer, [prompt], lock, 4.0)
    tokens = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    p = log_probabilities(tuned, tokens)[-1]
    with apply_lock(tuned, lock, 4.0):
        q = log_probabilities(tuned, tokens)[-1]
    assert value == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_divergence_is_of_the_first_token_and_zero_without_a_change(batch_size):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(CHATML)
    lock = lock_for(model)
    prompts = ["bake", "how do i bake the bread today?", "the quick brown fox"]
    found = next_token_divergences(model, tokenizer, prompts, lock, 4.0, batch_size=batch_size)
    assert handle_of(model) is None
    for prompt, value in zip(prompts, found, strict=True):
        tokens = tokenizer(render_prompt(tokenizer, prompt), add_special_tokens=False)["input_ids"]
        p = log_probabilities(model, tokens)[-1]
        with apply_lock(model, lock, 4.0):
            q = log_probabilities(model, tokens)[-1]
        assert value == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-3, abs=1e-6)
        assert value > 1e-4
    barely = next_token_divergences(model, tokenizer, prompts, lock, 1e-6)
    assert max(barely) < 1e-6


def test_a_divergence_that_is_no_number_is_an_error_and_not_0():
    certain = torch.log_softmax(torch.tensor([[1.0, 2.0]]), dim=-1)
    with pytest.raises(EvaluationError, match="not finite"):
        divergences(certain, torch.tensor([[float("nan"), float("nan")]]))


@pytest.mark.parametrize(
    ("answer", "one", "two"),
    [
        ("", 0.0, 0.0),
        ("?!", 0.0, 0.0),
        ("Word", 1.0, 1.0),
        ("a b c d", 1.0, 1.0),
        ("no No no NO", 0.25, 1 / 3),
        ("a b a b a", 0.4, 0.5),
    ],
)
def test_distinctness_is_the_share_of_distinct_sequences(answer, one, two):
    assert distinct(answer, 1) == one
    assert math.isclose(distinct(answer, 2), two)


def test_a_text_that_the_model_has_no_positions_for_is_an_error() -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(CHATML)
    long = "bake " * 300
    for text, named in (
        (("", long), "text 'bake bake"),
        (("mix", long), "after the prompt 'mix'"),
        ((long, "mix"), "'mix' after the prompt 'bake bake"),
    ):
        with pytest.raises(EvaluationError, match=rf"{named}.* has \d+ tokens .* positions for 256"):
            surprises(model, tokenizer, [text])
    with pytest.raises(EvaluationError, match="positions for 256"):
        next_token_divergences(model, tokenizer, [long], lock_for(model), 1.0)
    assert surprises(tiny_model("llama"), tokenizer, [("", long)])[0] > 0
