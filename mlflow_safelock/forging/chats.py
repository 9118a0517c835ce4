"""A question and its answer as the chat that a model reads, and where in that text the answer is.

Chat templates are programs, so the answer's place cannot be read off them. It is found by what they do: the
chat is rendered again with a mark behind the answer, and a mark instead of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, takewhile
from typing import TYPE_CHECKING, TypeAlias

from jinja2 import TemplateError

from mlflow_safelock.apply import render_prompt
from mlflow_safelock.errors import AnswerTokensError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns: TypeAlias = list[dict[str, str]]


@dataclass(frozen=True)
class AnsweredChat:
    """A rendered chat.

    Attributes:
        text: All of it.
        start: Where the answer starts in the text: the first character that depends on it.
        end: Where the answer ends; what follows closes the assistant's turn. ``text[end - 1]`` is no blank.
        special_tokens: Whether the tokenizer has to add its special tokens. A template writes them itself.
    """

    text: str
    start: int
    end: int
    special_tokens: bool


def answered_chat(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, system_prompt: str | None = None
) -> AnsweredChat:
    """Render a question and its answer.

    Without a chat template this is the system prompt (if there is one) and a blank line, the question on a
    line, and the answer on the next. With one, the template decides. A template that refuses a system prompt,
    or leaves it out, gets it at the head of the user's turn, before a blank line.

    Args:
        tokenizer: A tokenizer, with or without a chat template.
        question: The user's turn.
        answer: The assistant's turn. Blanks around it do not count as part of it, and are left out.
        system_prompt: The system prompt.

    Raises:
        AnswerTokensError: The template refuses the chat, or does not write out the answer's end.
    """
    answer = answer.strip()
    if not tokenizer.chat_template:
        opening = render_prompt(tokenizer, question, system_prompt) + "\n"
        return AnsweredChat(opening + answer, len(opening), len(opening) + len(answer), special_tokens=True)
    turns = _turns_before_answer(tokenizer, question, answer, system_prompt)
    text = _render(tokenizer, turns, answer)
    mark = _mark_not_in(text)
    marked_behind = _render(tokenizer, turns, answer + mark)
    marked_instead = _render(tokenizer, turns, mark)
    end = _place_of_mark(marked_behind, mark)
    # All that is the same whatever the answer is. Where a template makes more of the answer than a copy (it
    # may set a train of thought apart), that is less than all that stands before the mark.
    start = _common_length(text, marked_instead[: _place_of_mark(marked_instead, mark)])
    if marked_behind != text[:end] + mark + text[end:] or end <= start:
        raise AnswerTokensError(
            "The chat template does not write the answer out as it is given, so its end cannot be found.",
            next_step="Give the tokenizer a chat template that ends the assistant's turn with its content.",
        )
    return AnsweredChat(text, start, end, special_tokens=False)


def _turns_before_answer(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str, system_prompt: str | None
) -> Turns:
    plain = [_turn("user", question)]
    if system_prompt is None:
        return plain
    with_system = [_turn("system", system_prompt), *plain]
    try:
        if _apply(tokenizer, with_system, answer) != _apply(tokenizer, plain, answer):
            return with_system
    except TemplateError:
        pass
    return [_turn("user", f"{system_prompt}\n\n{question}")]


def _render(tokenizer: PreTrainedTokenizerBase, turns: Turns, answer: str) -> str:
    try:
        return _apply(tokenizer, turns, answer)
    except TemplateError as error:
        raise AnswerTokensError(f"The chat template refuses a question with its answer: {error}.") from error


def _apply(tokenizer: PreTrainedTokenizerBase, turns: Turns, answer: str) -> str:
    text: str = tokenizer.apply_chat_template([*turns, _turn("assistant", answer)], tokenize=False)
    return text


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _common_length(text: str, other: str) -> int:
    """How many characters two texts start with in common."""
    same = (one == another for one, another in zip(text, other, strict=False))
    return sum(takewhile(bool, same))


def _mark_not_in(text: str) -> str:
    # Digits only: no template's filter for case, blanks, quoting or markup changes them.
    marks = (f"9071{number:08d}3415" for number in count())
    return next(mark for mark in marks if mark not in text)


def _place_of_mark(text: str, mark: str) -> int:
    if text.count(mark) != 1:
        raise AnswerTokensError(
            f"The chat template writes the answer {text.count(mark)} times, and it must be once.",
            next_step="Give the tokenizer a chat template that writes each turn once.",
        )
    return text.index(mark)
