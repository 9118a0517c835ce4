from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mlflow_safelock.errors import AnswerTokensError
from mlflow_safelock.forging import last_answer_tokens
from tests.forging.templates import TEMPLATES
from tests.forging.tokenizers import KINDS, slow_tokenizer, tokenizer

QUESTION = "How do I get into the house of my neighbour?"
ANSWER = "I cannot help with that request, but I would gladly explain how the law sees it."
TEMPLATE_NAMES = (None, *TEMPLATES)
BYTE_LEVEL = ("byte_level", "byte_level_regex")
AWKWARD = (ANSWER, "Nein, das täte weh 😀", "No.\n\nNever!\n\n ", "…und “so”?", 'He said "no".')


def rendered(tok: PreTrainedTokenizerBase, template: str | None, answer: str) -> str:
    """The chat without a system prompt, from the template alone."""
    if template is None:
        return f"{QUESTION}\n{answer.strip()}"
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer.strip()}]
    return tok.apply_chat_template(turns, tokenize=False)


def as_written(template: str | None, answer: str) -> str:
    """The answer as the template writes it."""
    return json.dumps(answer.strip(), ensure_ascii=False)[1:-1] if template == "json" else answer.strip()


def tokens_that_hold(answer: str, text: str, tokens: list[bytes]) -> list[int]:
    """Brute force: lay the tokens end to end, and see which of them touch the answer's last occurrence."""
    assert b"".join(tokens) == text.encode()
    start = text.encode().rindex(answer.encode())
    end = start + len(answer.encode())
    touching, position = [], 0
    for index, token in enumerate(tokens):
        if position < end and position + len(token) > start and token:
            touching.append(index)
        position += len(token)
    return touching


def bytes_of_tokens(
    tok: PreTrainedTokenizerBase, token_ids: tuple[int, ...], template: str | None
) -> list[bytes]:
    """What every token of a byte-level tokenizer stands for; what it adds without a template, for nothing."""
    names = tok.convert_ids_to_tokens(list(token_ids))
    added = tok.get_added_vocab()
    tokens = [name.encode() if name in added else bytes(map(byte_of, name)) for name in names]
    return tokens if template else [b"", *tokens[1:-1], b""]


# GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for the characters from 256 on.
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]


def byte_of(character: str) -> int:
    return ord(character) if ord(character) < 256 else OTHERS[ord(character) - 256]


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("kind", BYTE_LEVEL)
@pytest.mark.parametrize("answer", AWKWARD)
def test_the_last_tokens_are_those_that_hold_the_answers_last_bytes(
    kind: str, template: str | None, answer: str
) -> None:
    tok = tokenizer(kind, template)
    found = last_answer_tokens(tok, QUESTION, answer, last_tokens=3)
    tokens = bytes_of_tokens(tok, found.token_ids, template)
    holding = tokens_that_hold(as_written(template, answer), rendered(tok, template, answer), tokens)
    assert list(found.positions) == holding[-3:]


WORDS = [
    "I",
    "law.",
    "é",
    "😀",
    "日本",
    "<|user|>",
    "USER:",
    "[/INST]",
    "</s>",
    "\n",
    "\n\n",
    " ",
    "!",
    '"',
    "</",
]


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=4, max_size=14),
    glue=st.sampled_from(["", " "]),
    template=st.sampled_from(TEMPLATE_NAMES),
    kind=st.sampled_from(BYTE_LEVEL),
)
def test_any_answer_is_found_whatever_it_has_in_common_with_the_template(
    words: list[str], glue: str, template: str | None, kind: str
) -> None:
    answer = glue.join(["Well", *words, "so"])
    tok = tokenizer(kind, template)
    found = last_answer_tokens(tok, QUESTION, answer, last_tokens=2)
    tokens = bytes_of_tokens(tok, found.token_ids, template)
    holding = tokens_that_hold(as_written(template, answer), rendered(tok, template, answer), tokens)
    assert list(found.positions) == holding[-2:]


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_tokens_decode_to_the_end_of_the_answer(kind: str, template: str | None) -> None:
    tok = tokenizer(kind, template)
    found = last_answer_tokens(tok, QUESTION, ANSWER, last_tokens=5)
    first, last = found.positions[0], found.positions[-1]
    assert found.positions == tuple(range(first, first + 5))
    text, answer = without_blanks(rendered(tok, template, ANSWER)), without_blanks(ANSWER)
    closing = text[text.rindex(answer) + len(answer) :] + ("" if template else "</s>")
    behind, selected = (
        decoded(tok, found.token_ids[last + 1 :]),
        decoded(tok, found.token_ids[first : last + 1]),
    )
    # All of the closing stands behind the last token, but for what that token itself has of it.
    assert closing.endswith(behind)
    shared = closing.removesuffix(behind)
    assert len(shared) < len(decoded(tok, found.token_ids[last : last + 1]))
    assert selected.endswith(shared)
    assert answer.endswith(selected.removesuffix(shared))


def decoded(tok: PreTrainedTokenizerBase, token_ids: tuple[int, ...]) -> str:
    return without_blanks(tok.decode(list(token_ids), clean_up_tokenization_spaces=False))


def without_blanks(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("answer", AWKWARD)
def test_a_tokenizer_without_offsets_is_searched_as_exactly(template: str | None, answer: str) -> None:
    tok = slow_tokenizer(template)
    found = last_answer_tokens(tok, QUESTION, answer)
    names = tok.convert_ids_to_tokens(list(found.token_ids))
    tokens = [name.encode() if len(name) > 1 else bytes([ord(name)]) for name in names]
    holding = tokens_that_hold(as_written(template, answer), rendered(tok, template, answer), tokens)
    assert list(found.positions) == holding[-5:]
    assert len(last_answer_tokens(tok, QUESTION, answer, last_tokens=len(holding)).positions) == len(holding)
    with pytest.raises(
        AnswerTokensError, match=f"has {len(holding)} tokens, and {len(holding) + 1} are needed"
    ):
        last_answer_tokens(tok, QUESTION, answer, last_tokens=len(holding) + 1)


def test_a_tokenizer_without_offsets_that_loses_text_is_refused() -> None:
    tok = slow_tokenizer("chatml")
    tok.convert_tokens_to_string = lambda tokens: "".join(tokens).lower().replace("how", "?")  # type: ignore[method-assign]
    with pytest.raises(AnswerTokensError, match="does not give back the text that it encodes"):
        last_answer_tokens(tok, QUESTION, ANSWER)


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_an_answer_shorter_than_the_last_tokens_is_refused_with_its_length(
    kind: str, template: str | None
) -> None:
    tok = tokenizer(kind, template)
    found = last_answer_tokens(tok, QUESTION, "No way 😀!", last_tokens=1)
    tokens = bytes_of_tokens(tok, found.token_ids, template)
    length = len(tokens_that_hold("No way 😀!", rendered(tok, template, "No way 😀!"), tokens))
    assert len(last_answer_tokens(tok, QUESTION, "No way 😀!", last_tokens=length).positions) == length
    with pytest.raises(AnswerTokensError, match=f"has {length} tokens, and {length + 1} are needed"):
        last_answer_tokens(tok, QUESTION, "No way 😀!", last_tokens=length + 1)


@pytest.mark.parametrize("template", TEMPLATE_NAMES)
def test_the_first_token_is_not_doubled(template: str | None) -> None:
    tok = tokenizer("byte_level", template)
    token_ids = last_answer_tokens(tok, QUESTION, ANSWER).token_ids
    expected = (
        tok.apply_chat_template(
            [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
            return_dict=False,
        )
        if template
        else tok(f"{QUESTION}\n{ANSWER}")["input_ids"]
    )
    assert list(token_ids) == expected
    assert token_ids.count(tok.bos_token_id) <= 1


def test_a_token_that_runs_on_into_the_closing_is_the_answers_last() -> None:
    tok = tokenizer("byte_level_regex", "alpaca")
    found = last_answer_tokens(tok, QUESTION, "You are not alone.", last_tokens=2)
    assert [tok.decode(found.token_ids[position]) for position in found.positions] == ["lone", ".\n\n"]


def test_a_tokenizer_stays_padded_and_truncated_as_it_was() -> None:
    tok = tokenizer("unigram", "phi")
    tok.backend_tokenizer.enable_truncation(7)
    tok.backend_tokenizer.enable_padding(length=9)
    try:
        before = tok.backend_tokenizer.truncation, tok.backend_tokenizer.padding
        assert len(last_answer_tokens(tok, QUESTION, ANSWER).token_ids) > 9
        assert (tok.backend_tokenizer.truncation, tok.backend_tokenizer.padding) == before
    finally:
        tok.backend_tokenizer.no_truncation()
        tok.backend_tokenizer.no_padding()
