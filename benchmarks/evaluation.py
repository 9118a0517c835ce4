"""Measuring a model with and without its lock: the whole evaluation beside the generation alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.harness import Contender, Settings, compare
from benchmarks.results import Row
from mlflow_safelock.apply import apply_lock, generate, geometry_from_config, render_prompt
from mlflow_safelock.evaluate import Settings as Measuring
from mlflow_safelock.evaluate import Subject, Suite, evaluate, load_suite
from mlflow_safelock.lock import SafetyLock
from tests.models import CHATML, random_lock, tiny_model, tiny_tokenizer

ALPHA = 1.0
BATCH = 8


def run(settings: Settings) -> Iterator[Row]:
    """The starter suite's prompts and twins, in both arms; a random model ends no answer before the limit.

    Of two sizes: in the small one a step takes hardly longer than what calls it, and all that is not
    generation weighs more than it does in any model that is used.
    """
    threads = torch.get_num_threads()
    # As fast for a model this small, and work beside it disturbs one thread less than several that wait.
    torch.set_num_threads(1)
    try:
        if settings.quick:
            yield _measured(48, 3, prompts=4, tokens=4, repetitions=1)
        else:
            everything = len(load_suite("starter-harmful").prompts)
            yield _measured(256, 4, prompts=everything, tokens=128, repetitions=3)
            yield _measured(512, 6, prompts=everything, tokens=128, repetitions=1)
    finally:
        torch.set_num_threads(threads)


def _measured(width: int, layers: int, *, prompts: int, tokens: int, repetitions: int) -> Row:
    model = tiny_model("llama", hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers)
    tokenizer = tiny_tokenizer(CHATML)
    lock = random_lock(geometry_from_config(model.config), heads=8)
    whole = load_suite("starter-harmful")
    suite = replace(whole, prompts=whole.prompts[:prompts])
    asked = [text for one in suite.prompts for text in (one.prompt, one.twin or "")]
    measuring = Measuring(max_new_tokens=tokens, batch_size=BATCH)
    subject = Subject("benchmark", model, tokenizer, lock, ALPHA)
    answered: list[list[str]] = []
    row = compare(
        "evaluation",
        f"{len(asked)} prompts x {tokens} tokens, with and without the lock, batches of {BATCH}, "
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M weights",
        ours=Contender("evaluate", lambda: _texts(subject, suite, measuring), answered.append),
        theirs=Contender(
            "model.generate, batch by batch, both arms",
            lambda: _bare(model, tokenizer, asked, lock, tokens),
            answered.append,
        ),
        limit=Contender(
            "apply.generate, both arms",
            lambda: _generated(model, tokenizer, asked, lock, tokens),
            answered.append,
        ),
        repetitions=repetitions,
        figures={"answers of both arms": 2 * len(asked)},
        cpu=True,
    )
    # In other batches numbers are rounded otherwise, and a random model has tokens that are likely alike.
    differing = max(len(Counter(one) - Counter(answered[0])) for one in answered)
    if differing > 0.02 * len(answered[0]):
        raise AssertionError(f"{differing} answers of the ways that are compared are different")
    return row


def _texts(subject: Subject, suite: Suite, measuring: Measuring) -> list[str]:
    found = evaluate(subject, suite, measuring)
    answers = [one for row in found.rows for one in (row.locked, row.unlocked)]
    return [one.text for one in answers if one is not None]


def _generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], lock: SafetyLock, tokens: int
) -> list[str]:
    def once() -> list[str]:
        answers = generate(model, tokenizer, asked, max_new_tokens=tokens, batch_size=BATCH)
        return [answer.text for answer in answers]

    with apply_lock(model, lock, ALPHA):
        locked = once()
    return [*locked, *once()]


def _bare(
    model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], lock: SafetyLock, tokens: int
) -> list[str]:
    with apply_lock(model, lock, ALPHA):
        locked = _bare_arm(model, tokenizer, asked, tokens)
    return [*locked, *_bare_arm(model, tokenizer, asked, tokens)]


def _bare_arm(model: Any, tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], tokens: int) -> list[str]:
    """What a careful user writes: sorted by length, padded on the left."""
    texts = sorted((render_prompt(tokenizer, prompt) for prompt in asked), key=len)
    answers: list[str] = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(
            texts[start : start + BATCH],
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            made = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
