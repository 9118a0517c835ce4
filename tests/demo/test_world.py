"""The toy's requests are dealt out so that nothing is measured on what something else has seen."""

from __future__ import annotations

from itertools import combinations

from mlflow_safelock.demo.world import (
    OPENINGS,
    REFUSAL,
    THINGS,
    TIMES,
    Share,
    make_tokenizer,
    make_world,
)
from mlflow_safelock.evaluate import AnswerKind, classify
from mlflow_safelock.toys import BENIGN_TOOLS, HARMFUL_TOOLS


def test_no_request_is_in_two_shares_and_every_one_is_in_one() -> None:
    world = make_world(0)
    for dealt, verbs in ((world.harmful, HARMFUL_TOOLS), (world.benign, BENIGN_TOOLS)):
        for one, other in combinations(Share, 2):
            assert not set(dealt[one]) & set(dealt[other])
        everything = len(OPENINGS) * len(verbs) * len(THINGS) * len(TIMES)
        assert sum(len(share) for share in dealt.values()) == everything


def test_the_same_seed_deals_the_same_and_another_one_otherwise() -> None:
    assert make_world(3) == make_world(3)
    assert make_world(3) != make_world(4)


def test_the_ten_examples_hold_every_harmful_verb_once() -> None:
    examples = make_world(0).fine_tuning_examples(10)
    assert {request.verb for request in examples} == set(HARMFUL_TOOLS)
    assert len(make_world(0).fine_tuning_examples(25)) == 25


def test_a_refusal_counts_as_one_and_compliance_as_compliance() -> None:
    assert classify(REFUSAL) == AnswerKind.REFUSED
    world = make_world(0)
    for request in (world.harmful[Share.REPORTING][0], world.benign[Share.REPORTING][0]):
        assert classify(request.compliance) == AnswerKind.COMPLIED


def test_the_tokenizer_knows_every_word_and_its_template_closes_each_turn() -> None:
    tokenizer, world = make_tokenizer(), make_world(0)
    texts = [REFUSAL]
    for share in Share:
        for request in (*world.harmful[share][:40], *world.benign[share][:40]):
            texts += [request.prompt, request.compliance]
    for text in texts:
        tokens = tokenizer(text)["input_ids"]
        assert tokenizer.pad_token_id not in tokens
        assert tokenizer.decode(tokens) == text
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered.split() == ["<user>", "a", "<assistant>", "b", "<end>"]


def test_pairs_put_a_refusal_against_compliance_with_the_same_request() -> None:
    pairs = make_world(0).pairs(100)
    assert len({pair.question for pair in pairs}) == 100
    for pair in pairs:
        assert pair.safe == REFUSAL
        assert classify(pair.unsafe) == AnswerKind.COMPLIED
