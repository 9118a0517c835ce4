from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from mlflow_safelock.apply import apply_lock, attention_of
from mlflow_safelock.errors import (
    AlphaError,
    AlreadyLockedError,
    AnswerTokensError,
    ForgeError,
    LockValidationError,
    PreferenceDataError,
    UnsupportedArchitectureError,
)
from mlflow_safelock.forging import (
    UNKNOWN_BASE,
    ForgeSettings,
    PreferencePair,
    Probing,
    collect_activations,
    dataset_digest,
    forge,
    forge_from_activations,
    probe_model,
    starter_preference_pairs,
)
from mlflow_safelock.forging.base_tokenizer import digest_of_tokenizer
from mlflow_safelock.lock import SafetyLock
from tests import reference
from tests.models import CHATML, tiny_model, tiny_tokenizer

PAIRS = starter_preference_pairs()[:20]
TOKENIZER = tiny_tokenizer(CHATML)
WHEN = "2026-01-31T12:00:00+00:00"


def model(family: str = "llama") -> PreTrainedModel:
    return tiny_model(family, max_position_embeddings=512)


def forged(base: PreTrainedModel | None = None, pairs: Any = PAIRS, **changes: Any) -> SafetyLock:
    settings = {"heads": 4, "last_tokens": 3, "created": WHEN, "progress": False} | changes
    return forge(model() if base is None else base, TOKENIZER, pairs, **settings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("split", ["pair", "row"])
def test_the_lock_is_that_of_the_reference(family: str, split: str) -> None:
    base = model(family)
    lock = forged(base, split=split, seed=5)
    collected = collect_activations(base, TOKENIZER, PAIRS, last_tokens=3, progress=False)
    activations, labels = collected.values.numpy(), collected.labels.numpy()
    unit = np.arange(120) // 6 if split == "pair" else np.arange(120)
    drawn = np.random.default_rng(5).permutation(unit.max() + 1)[: round(0.6 * (unit.max() + 1))]
    train = np.flatnonzero(np.isin(unit, drawn))
    scores = reference.probe_scores(activations, labels, train, np.setdiff1d(np.arange(120), train))
    assert lock.scores is not None
    np.testing.assert_allclose(lock.scores, scores, rtol=0, atol=1e-6)
    places = reference.top_heads(scores, 4)
    assert [(head.layer, head.head) for head in lock.ranked_heads()] == places
    for locked, (layer, head) in zip(lock.ranked_heads(), places, strict=True):
        direction, std = reference.direction_and_std(activations[:, layer, head], labels)
        np.testing.assert_allclose(locked.direction, direction, rtol=0, atol=1e-6)
        assert locked.std == pytest.approx(std, abs=1e-6)


def test_the_lock_says_how_it_was_made() -> None:
    base = model("qwen3")
    lock = forged(
        base,
        heads=6,
        last_tokens=2,
        system_prompt="be kind.",
        split="row",
        seed=7,
        train_fraction=0.7,
        base_model="example/base",
        base_revision="abc",
        default_alpha=5.0,
    )
    about = lock.metadata
    assert len(lock.heads) == 6
    assert about.geometry == attention_of(base).geometry
    assert (about.base_model, about.base_revision, about.architecture) == ("example/base", "abc", "qwen3")
    assert (about.origin, about.last_tokens, about.pairs) == ("forged", 2, 20)
    assert (about.split, about.seed, about.train_fraction) == ("row", 7, 0.7)
    assert (about.system_prompt, about.dataset_digest) == ("be kind.", dataset_digest(PAIRS))
    assert (about.default_alpha, about.created) == (5.0, WHEN)


def test_what_is_not_given_comes_from_the_models_configuration() -> None:
    base = model()
    assert forged(base).metadata.base_model == UNKNOWN_BASE
    base.config.name_or_path, base.config._commit_hash = "example/hub-id", "c0ffee"
    about = forged(base).metadata
    assert (about.base_model, about.base_revision) == ("example/hub-id", "c0ffee")
    assert forged(base, base_model="other").metadata.base_model == "other"


def test_the_same_arguments_give_the_same_digest() -> None:
    first, second = forged(), forged()
    assert first.digest == second.digest
    digests = {
        forged(**change).digest
        for change in (
            {"seed": 1},
            {"last_tokens": 4},
            {"system_prompt": "be kind."},
            {"heads": 3},
            {"split": "row"},
        )
    }
    assert len(digests | {first.digest}) == 6
    assert forged(pairs=PAIRS[::-1]).digest != first.digest


def test_forging_is_collecting_and_then_forging_from_activations() -> None:
    base = model()
    collected = collect_activations(base, TOKENIZER, PAIRS, last_tokens=3, progress=False)
    lock = forge_from_activations(
        collected.values,
        collected.labels,
        heads=4,
        hidden=collected.geometry.hidden,
        architecture="llama",
        dataset_digest=dataset_digest(PAIRS),
        created=WHEN,
    )
    # Activations do not tell the base's weights and tokenizer, which a lock from the model keeps some of.
    whole = forged(base)
    metadata = whole.metadata.model_copy(update={"tokenizer": None})
    assert whole.metadata.tokenizer == digest_of_tokenizer(TOKENIZER)
    assert lock == replace(whole, metadata=metadata, unit_biases=None, sketch=None)


def test_locks_of_several_sizes_come_out_of_one_pass_over_the_model() -> None:
    base = model()
    runs = []
    hook = base.model.register_forward_pre_hook(lambda *_: runs.append(1))
    settings = ForgeSettings(created=WHEN, batch_size=8, progress=False)
    probed = probe_model(base, TOKENIZER, PAIRS, Probing(last_tokens=3), settings)
    hook.remove()
    assert len(runs) == 5  # 40 chats in batches of 8
    assert [probed.lock(heads) for heads in (2, 4, 12)] == [forged(base, heads=heads) for heads in (2, 4, 12)]


def test_pairs_that_ask_the_same_stay_together() -> None:
    # Ten questions, each asked twice in other places, with other answers.
    pairs = [
        PreferencePair(f" {pair.question}" if again else pair.question, pair.safe + "!" * again, pair.unsafe)
        for again in (0, 1)
        for pair in PAIRS[:10]
    ]
    base = model()
    collected = collect_activations(base, TOKENIZER, pairs, last_tokens=3, progress=False)
    questions = np.repeat(np.tile(np.arange(10), 2), 6)
    expected = forge_from_activations(
        collected.values, collected.labels, heads=12, pairs=questions, created=WHEN
    )
    np.testing.assert_array_equal(forged(base, pairs=pairs, heads=12).scores, expected.scores)
    assert forged(base, pairs=pairs).metadata.pairs == 20


def test_the_lock_locks_the_model_it_was_forged_from() -> None:
    base = model()
    tokens = torch.tensor([TOKENIZER("how do i bake the bread today?")["input_ids"]])
    with torch.no_grad():
        before = base(tokens).logits
        with apply_lock(base, forged(base)):
            assert not torch.allclose(base(tokens).logits, before)
        assert torch.equal(base(tokens).logits, before)


def test_a_locked_model_is_refused() -> None:
    base = model()
    with apply_lock(base, forged(base)), pytest.raises(ForgeError, match="The model carries a lock"):
        forged(base)
    assert forged(base) == forged()


def test_a_model_that_was_saved_locked_is_refused(tmp_path: Any) -> None:
    base = model()
    with apply_lock(base, forged(base)):
        base.config.save_pretrained(tmp_path)
    again = model()
    again.config = type(base.config).from_pretrained(tmp_path)
    with pytest.raises(AlreadyLockedError, match="was saved with a lock in it"):
        forged(again)


def never_runs() -> PreTrainedModel:
    base = model()
    base.model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    return base


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heads": 13}, ForgeError, r"13 heads are asked for, and the model has 12 \(3 layers x 4 heads"),
        ({"heads": 0}, ForgeError, "heads must be a whole number above zero"),
        ({"last_tokens": 0}, ForgeError, "last_tokens must be a whole number above zero, not 0"),
        ({"last_tokens": -5}, ForgeError, "last_tokens must be a whole number above zero"),
        ({"last_tokens": 65537}, ForgeError, "last_tokens must be at most 65536"),
        ({"last_tokens": 65536}, AnswerTokensError, "and 65536 are needed"),
        ({"batch_size": 65537}, ForgeError, "batch_size must be at most 65536"),
        ({"last_tokens": 2.5}, ForgeError, "last_tokens must be a whole number above zero"),
        ({"batch_size": 0}, ForgeError, "batch_size must be a whole number above zero"),
        ({"last_tokens": 500}, AnswerTokensError, "Pair 1, safe answer: The answer .* and 500 are needed"),
        ({"split": "given"}, ForgeError, "split must be 'pair' or 'row'"),
        ({"seed": -1}, ForgeError, "seed must be a whole number"),
        ({"train_fraction": 1.0}, ForgeError, "train_fraction must lie between 0 and 1"),
        ({"train_fraction": "0.6"}, ForgeError, "train_fraction must lie between 0 and 1"),
        ({"default_alpha": None}, AlphaError, "Alpha must be a number, not None"),
        ({"default_alpha": True}, AlphaError, "Alpha must be a number, not True"),
        ({"default_alpha": -6.0}, LockValidationError, "default_alpha"),
        ({"pairs": [("q", "a", "b")] * 9}, PreferenceDataError, "Pair 0 is of type 'tuple'.*load_pairs"),
        ({"pairs": "pairs.jsonl"}, PreferenceDataError, "Pair 0 is of type 'str'.*load_pairs"),
        ({"pairs": []}, ForgeError, "0 pairs are too few"),
        ({"pairs": PAIRS[:1]}, ForgeError, "1 pairs are too few"),
        ({"pairs": [PAIRS[0]] * 9}, ForgeError, "1 pairs are too few"),
        ({"created": "now"}, LockValidationError, "created"),
    ],
)
def test_what_cannot_be_forged_is_refused_before_the_model_runs(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        forged(never_runs(), **changes)


def test_names_in_the_place_of_a_model_or_tokenizer_are_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match=r"of type 'str'.*from_pretrained"):
        forge("org/base", TOKENIZER, PAIRS)  # type: ignore[call-overload]
    with pytest.raises(ForgeError, match=r"tokenizer is 'org/base'.*from_pretrained"):
        forge(never_runs(), "org/base", PAIRS, heads=4)  # type: ignore[call-overload]


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="mamba"):
        forged(tiny_model("mamba"))


def test_a_model_that_puts_out_nan_is_refused_with_the_head() -> None:
    base = model()
    with torch.no_grad():
        base.model.layers[1].self_attn.v_proj.weight[0] = torch.nan
    with pytest.raises(ForgeError, match="layer 1, head 0 hold NaN"):
        forged(base)


def test_two_pairs_are_enough() -> None:
    assert forged(pairs=PAIRS[:2]).metadata.pairs == 2


def test_locks_of_several_sizes_come_from_one_pass() -> None:
    base = model()
    passes: list[int] = []
    base.model.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    few, many = forged(base, heads=(2, 5))
    once = len(passes)
    assert (few.digest, many.digest) == (forged(base, heads=2).digest, forged(base, heads=5).digest)
    assert len(passes) == 3 * once
    with pytest.raises(ForgeError, match="at least one"):
        forged(base, heads=())
    with pytest.raises(ForgeError, match="13 heads are asked for"):
        forged(base, heads=(2, 13))
