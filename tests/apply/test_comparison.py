from __future__ import annotations

import pytest
import torch

from mlflow_safelock.apply import apply_lock, compare, generate, handle_of
from mlflow_safelock.errors import AlreadyLockedError, ApplyError, LockMismatchError
from tests.apply.conftest import lock_for, logits
from tests.models import CHATML, tiny_model, tiny_tokenizer

PROMPTS = ["how do i bake the bread", "how do i forge the letter"]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer(CHATML)


@pytest.mark.parametrize("alpha", [6.0, -6.0])
def test_answers_are_those_of_the_unlocked_and_the_locked_model(llama, lock, tokenizer, alpha):
    before = generate(llama, tokenizer, PROMPTS, max_new_tokens=8, system_prompt="be kind")
    with apply_lock(llama, lock, alpha):
        after = generate(llama, tokenizer, PROMPTS, max_new_tokens=8, system_prompt="be kind")
    found = compare(llama, tokenizer, PROMPTS, lock, alpha, max_new_tokens=8, system_prompt="be kind")
    assert [item.prompt for item in found] == PROMPTS
    assert [item.before for item in found] == [answer.text for answer in before]
    assert [item.after for item in found] == [answer.text for answer in after]
    assert before != after


def test_one_text_in_place_of_a_list_is_refused_and_leaves_the_model_unlocked(llama, lock, tokenizer):
    with pytest.raises(ApplyError, match="a sequence of texts"):
        compare(llama, tokenizer, "hello", lock)
    assert handle_of(llama) is None


def test_the_sign_of_alpha_matters(llama, lock, tokenizer):
    plus = compare(llama, tokenizer, PROMPTS, lock, 6.0, max_new_tokens=8)
    minus = compare(llama, tokenizer, PROMPTS, lock, -6.0, max_new_tokens=8)
    assert [item.before for item in plus] == [item.before for item in minus]
    assert [item.after for item in plus] != [item.after for item in minus]


def test_the_model_is_left_as_it_was_and_on_error_too(llama, lock, tokenizer):
    before = logits(llama)
    compare(llama, tokenizer, PROMPTS, lock, max_new_tokens=4)
    assert torch.equal(logits(llama), before)
    with pytest.raises(ApplyError, match="has no tokens"):
        compare(llama, tiny_tokenizer(), ["fine", ""], lock, max_new_tokens=4)
    assert handle_of(llama) is None
    assert torch.equal(logits(llama), before)


def test_a_lock_that_does_not_fit_fails_before_anything_is_generated(llama, lock, tokenizer):
    with pytest.raises(LockMismatchError):
        compare(tiny_model("gpt2"), tokenizer, PROMPTS, lock)
    handle = apply_lock(llama, lock)
    with pytest.raises(AlreadyLockedError):
        compare(llama, tokenizer, PROMPTS, lock_for(llama, seed=2))
    handle.verify()
