from __future__ import annotations

import pytest

from mlflow_safelock.apply import render_prompt
from mlflow_safelock.errors import AnswerTokensError
from mlflow_safelock.forging.chats import answered_chat
from tests.forging.templates import TEMPLATES
from tests.forging.tokenizers import tokenizer

QUESTION, ANSWER, SYSTEM = "May I?", "You may not, I fear.", "Be kind."


def with_template(source: str):
    tok = tokenizer("byte_level", None)
    fresh = type(tok)(tokenizer_object=tok.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    fresh.chat_template = source
    return fresh


def test_without_a_template_the_answer_follows_the_prompt_on_a_line_of_its_own() -> None:
    tok = tokenizer("byte_level", None)
    assert answered_chat(tok, QUESTION, ANSWER, SYSTEM).text == "Be kind.\n\nMay I?\nYou may not, I fear."
    assert answered_chat(tok, QUESTION, ANSWER).text == "May I?\nYou may not, I fear."
    assert answered_chat(tok, QUESTION, ANSWER, SYSTEM).text.startswith(render_prompt(tok, QUESTION, SYSTEM))


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_span_is_the_answer(template: str) -> None:
    chat = answered_chat(tokenizer("byte_level", template), QUESTION, f"\n {ANSWER}\n", SYSTEM)
    assert chat.text[chat.start : chat.end] == ANSWER
    assert not chat.special_tokens


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_span_is_the_answer_where_the_question_or_the_system_prompt_says_the_same(template: str) -> None:
    chat = answered_chat(tokenizer("byte_level", template), ANSWER, ANSWER, ANSWER)
    assert chat.text[chat.start : chat.end] == ANSWER
    assert ANSWER not in chat.text[chat.end :]
    assert ANSWER in chat.text[: chat.start]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_system_prompt_is_in_every_chat(template: str) -> None:
    chat = answered_chat(tokenizer("byte_level", template), QUESTION, ANSWER, SYSTEM)
    assert chat.text.count(SYSTEM) == 1


def test_a_template_that_refuses_a_system_prompt_gets_it_with_the_question() -> None:
    text = answered_chat(tokenizer("byte_level", "gemma"), QUESTION, ANSWER, SYSTEM).text
    assert text.startswith("<s><start_of_turn>user\nBe kind.\n\nMay I?<end_of_turn>")


def test_a_template_that_leaves_a_system_prompt_out_gets_it_with_the_question() -> None:
    text = answered_chat(tokenizer("byte_level", "deaf"), QUESTION, ANSWER, SYSTEM).text
    assert text.startswith("<user>Be kind.\n\nMay I?</user>")


def test_a_thought_that_the_template_cuts_off_is_not_part_of_the_answer() -> None:
    chat = answered_chat(tokenizer("byte_level", "deepseek"), QUESTION, f"<think>Hm.</think>{ANSWER}")
    assert chat.text[chat.start : chat.end] == ANSWER
    assert "Hm." not in chat.text


def test_a_thought_that_the_template_sets_apart_leaves_the_end_where_it_is() -> None:
    chat = answered_chat(tokenizer("byte_level", "thinking"), QUESTION, f"<think>\nHm.\n</think>\n\n{ANSWER}")
    assert chat.text[chat.start : chat.end] == f"Hm.\n</think>\n\n{ANSWER}"
    assert chat.text[chat.end :] == "<|im_end|>\n"


def test_an_answer_of_digits_is_not_mistaken_for_the_mark() -> None:
    digits = "9071000000003415 9071000000013415"
    chat = answered_chat(tokenizer("byte_level", "chatml"), digits, digits)
    assert chat.text[chat.start : chat.end] == digits
    assert chat.text[chat.end :] == "<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "writes the answer 2 times"),
        ("{% for m in messages[:-1] %}{{ m.content }}{% endfor %}", "writes the answer 0 times"),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "writes the answer 0 times"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content | length }}{% endfor %}",
            "does not write the answer out as it is given",
        ),
        ("{{ raise_exception('not today') }}", "refuses a question with its answer: not today"),
    ],
)
def test_a_template_that_does_not_write_the_answer_out_is_refused(source: str, message: str) -> None:
    with pytest.raises(AnswerTokensError, match=message):
        answered_chat(with_template(source), QUESTION, ANSWER)
