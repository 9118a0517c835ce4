"""The last tokens of an answer, found exactly in the tokens of the chat that it is part of (METHOD, step 2).

A token belongs to the answer if it holds at least one of the answer's characters, blanks around the answer
not counted. So a token that runs on into what closes the turn, or comes from what precedes the answer, still
belongs to it, and tokens of the closing itself do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from mlflow_safelock.apply.generation import default_tokenization
from mlflow_safelock.errors import AnswerTokensError
from mlflow_safelock.forging.chats import AnsweredChat, answered_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerTokens:
    """A tokenized chat, and which of its tokens are the answer's last.

    Attributes:
        token_ids: The whole chat.
        positions: Positions in it of the answer's last tokens, ascending, one after the other.
    """

    token_ids: tuple[int, ...]
    positions: tuple[int, ...]


def last_answer_tokens(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    answer: str,
    *,
    last_tokens: int = 5,
    system_prompt: str | None = None,
) -> AnswerTokens:
    """Tokenize a question and its answer as a chat, and find the answer's last tokens.

    Args:
        tokenizer: A tokenizer, with or without a chat template; without one the chat is plain text
            (``answered_chat``).
        question: The user's turn.
        answer: The assistant's turn.
        last_tokens: How many tokens to find (``r`` in the paper).
        system_prompt: The system prompt.

    Raises:
        AnswerTokensError: The answer has fewer tokens, or cannot be found.
    """
    chat = answered_chat(tokenizer, question, answer, system_prompt)
    with default_tokenization(tokenizer):
        encoding = tokenizer(
            chat.text,
            add_special_tokens=chat.special_tokens,
            return_offsets_mapping=tokenizer.is_fast,
            truncation=False,
        )
    token_ids = encoding["input_ids"]
    if tokenizer.is_fast:
        span = _span_by_offsets(encoding["offset_mapping"], chat)
    else:
        span = _span_by_decoding(tokenizer, token_ids, chat)
    first, last = span
    if last - first + 1 < last_tokens:
        raise AnswerTokensError(
            f"The answer {answer[:80]!r} has {last - first + 1} tokens, and {last_tokens} are needed.",
            next_step="Use longer answers, or fewer last tokens.",
        )
    return AnswerTokens(tuple(token_ids), tuple(range(last - last_tokens + 1, last + 1)))


def _span_by_offsets(offsets: Sequence[tuple[int, int]], chat: AnsweredChat) -> tuple[int, int]:
    """First and last token of the answer, by the characters that each token stands for.

    The answer neither starts nor ends with a blank, so it does not matter that some tokenizers leave blanks
    out of their tokens' characters. A character may be spread over several tokens.
    """
    first = (token for token, (start, end) in enumerate(offsets) if start <= chat.start < end)
    last = (token for token, (start, end) in reversed(list(enumerate(offsets))) if start < chat.end <= end)
    span = next(first, None), next(last, None)
    if span[0] is None or span[1] is None:
        raise AnswerTokensError(
            "The tokenizer does not say which of its tokens hold the answer's first and last character.",
            next_step="It may drop characters: check that decoding what it encodes gives the text back.",
        )
    return span[0], span[1]


def _span_by_decoding(
    tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], chat: AnsweredChat
) -> tuple[int, int]:
    """First and last token of the answer, for tokenizers that do not say which characters a token holds.

    A token holds a character if the text decoded up to and with the token has it, and the text decoded up to
    the token has not. Blanks are left out of all texts, as decoding may add or drop them.
    """

    def decoded(tokens: int) -> str:
        return _without_blanks(tokenizer.decode(token_ids[:tokens], clean_up_tokenization_spaces=False))

    text = _without_blanks(chat.text)
    before, through = _without_blanks(chat.text[: chat.start]), _without_blanks(chat.text[: chat.end])
    whole = decoded(len(token_ids))
    offset = whole.find(text)  # what a tokenizer adds stands before or behind the text
    if offset < 0:
        raise AnswerTokensError(
            "This tokenizer does not give back the text that it encodes, so no answer can be found in it.",
            next_step="Load a fast tokenizer: AutoTokenizer.from_pretrained(..., use_fast=True).",
        )
    start, end = offset + len(before), offset + len(through)
    first = _tokens_until(decoded, lambda part: part[:start] == whole[:start] and len(part) > start)
    last = _tokens_until(decoded, lambda part: part[:end] == whole[:end])
    return first - 1, last - 1


def _tokens_until(decoded: Callable[[int], str], reached: Callable[[str], bool]) -> int:
    """The least number of tokens that decode to what is asked for.

    It is asked of every number, because a token may end within a character, which decodes to a stand-in then.
    """
    return next(tokens for tokens in count() if reached(decoded(tokens)))


def _without_blanks(text: str) -> str:
    return "".join(text.split())
