"""Greedy answers of a model to many prompts: the same text in whatever batches it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from transformers import GenerationConfig

from mlflow_safelock.apply.placement import execution_device
from mlflow_safelock.apply.positions import position_limit
from mlflow_safelock.errors import ApplyError
from mlflow_safelock.unicode import HALF_A_CHARACTER, is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Chat = Sequence[Mapping[str, object]]
"""The turns of a chat, each with ``role`` and ``content``, as chat templates take them."""


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    Attributes:
        text: New text only, without special tokens.
        tokens: How many tokens it has, before the one that ends it.
        finished: Whether the model ended it, and not the limit.
    """

    text: str
    tokens: int
    finished: bool


Batch = Callable[[Mapping[int, Answer]], None]
"""Is told of every batch: its answers, by the prompts' places."""


First = Callable[[Mapping[int, torch.Tensor]], None]
"""Is told of every batch which first token the model expects of its answers: logits, ``[vocabulary]`` in
float32 on the model's device, by the prompts' places."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Chat],
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    on_batch: Batch | None = None,
    on_first: First | None = None,
) -> list[Answer]:
    """Answer prompts greedily: at every step the likeliest token, whatever the model's own settings are.

    Model and tokenizer are left as they were, their modes and settings included.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer. With a chat template, each prompt is the user's turn of a chat; without one,
            it is continued as it stands.
        prompts: The prompts; one of several turns is a chat.
        system_prompt: System prompt of every chat; without a chat template, text before every prompt.
        max_new_tokens: Most tokens of an answer.
        batch_size: How many prompts are answered at once.
        on_batch: Is told of every batch as soon as it is answered.
        on_first: Is told of the first step of every batch, which costs no reading of its own.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        ApplyError: A prompt has no tokens, or with its answer more than the model has positions for, the chat
            template takes no system prompt, there is none for a chat of several turns, or the model has no
            weights.
    """
    _refuse_unusable(prompts, max_new_tokens, batch_size)
    with default_tokenization(tokenizer):
        tokens = [_tokens(tokenizer, prompt, system_prompt) for prompt in prompts]
    _refuse_too_long(prompts, tokens, max_new_tokens, position_limit(model))
    # Prompts of like length together: less padding to compute.
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    answers: dict[int, Answer] = {}
    with _greedy(model, tokenizer, max_new_tokens) as settings:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            with _first_step(model) as seen:
                new_tokens = _continue(model, [tokens[index] for index in batch], settings).tolist()
            if on_first is not None and seen:
                on_first(dict(zip(batch, seen[0], strict=True)))
            answered = {
                index: _answer(tokenizer, row, settings) for index, row in zip(batch, new_tokens, strict=True)
            }
            answers |= answered
            if on_batch is not None:
                on_batch(answered)
    return [answers[index] for index in range(len(tokens))]


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | Chat, system_prompt: str | None = None
) -> str:
    """The text that a model continues to answer a prompt.

    Args:
        tokenizer: Its tokenizer, with or without a chat template.
        prompt: The prompt, or a chat that ends with a user's turn.
        system_prompt: The system prompt.

    Raises:
        ApplyError: The chat template refuses, such as one that takes no system prompt, or there is none and
            the chat has several turns, or the text is not valid Unicode.
    """
    text = _rendered(tokenizer, prompt, system_prompt)
    if not is_unicode(text):
        raise ApplyError(
            f"A prompt, or the system prompt before it, {HALF_A_CHARACTER}: {text[:200]!r}.",
            next_step="Write the text anew; on the command line it must be UTF-8.",
        )
    return text


def _rendered(tokenizer: PreTrainedTokenizerBase, prompt: str | Chat, system_prompt: str | None) -> str:
    chat: Chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [dict(turn) for turn in chat]
    if not tokenizer.chat_template:
        return _without_template(turns, system_prompt)
    if system_prompt is not None:
        turns.insert(0, {"role": "system", "content": system_prompt})
    try:
        rendered: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ApplyError(
            f"The tokenizer's chat template refuses this chat: {error}.",
            next_step="If it takes no system prompt, leave that out.",
        ) from error
    return rendered


def _without_template(turns: Chat, system_prompt: str | None) -> str:
    if len(turns) != 1:
        raise ApplyError(
            f"The tokenizer has no chat template, and this chat has {len(turns)} turns.",
            next_step="Set the tokenizer's chat_template, or ask prompts of one turn.",
        )
    prompt = str(turns[0]["content"])
    return prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"


def _refuse_unusable(prompts: object, max_new_tokens: object, batch_size: object) -> None:
    if isinstance(prompts, str):
        raise ApplyError(
            "Prompts must be a sequence of texts, and one text is given.", next_step="Put it into a list."
        )
    for name, number in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
            raise ApplyError(
                f"{name} must be a whole number from 1, and it is {number!r}.",
                next_step="Leave it out for the default.",
            )


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | Chat, system_prompt: str | None) -> list[int]:
    text = render_prompt(tokenizer, prompt, system_prompt)
    # A chat template writes the special tokens itself.
    tokens: list[int] = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if not tokens:
        raise ApplyError(f"The prompt {prompt!r} has no tokens.", next_step="Leave out empty prompts.")
    return tokens


def _refuse_too_long(
    prompts: Sequence[str | Chat], tokens: Sequence[Sequence[int]], max_new_tokens: int, limit: int | None
) -> None:
    for prompt, row in zip(prompts, tokens, strict=True):
        needed = len(row) + max_new_tokens - 1  # the last token of an answer is never read
        if limit is not None and needed > limit:
            text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
            room = limit - len(row) + 1
            raise ApplyError(
                f"The prompt {text[:60]!r} has {len(row)} tokens as the model is given it, which with "
                f"{max_new_tokens} new ones takes {needed} positions, and the model has {limit}.",
                next_step="Shorten the prompt, or "
                + (f"ask for at most {room} new tokens." if room > 0 else "leave it out."),
            )


@contextmanager
def _first_step(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """The logits of the next step, ``[prompts, vocabulary]``, in a list that is empty before it."""
    seen: list[torch.Tensor] = []

    def see(_module: object, _inputs: object, outputs: Any) -> None:
        # A processor of logits would see them, too, and have its signature looked up at every step.
        seen.append(outputs.logits[:, -1].float().clone())
        hook.remove()

    inner: Any = getattr(model, "_orig_mod", model)
    hook = _unwrapped(inner).register_forward_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def _unwrapped(model: Any) -> Any:
    """The model of ``transformers`` that generates, below adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _continue(model: PreTrainedModel, prompts: list[list[int]], settings: GenerationConfig) -> torch.Tensor:
    """New tokens, ``[prompts, steps]``, for prompts padded on the left, so that all of them end together."""
    width = max(len(tokens) for tokens in prompts)
    inputs = torch.full((len(prompts), width), settings.pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(inputs)
    for row, tokens in enumerate(prompts):
        inputs[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    device = execution_device(model)
    outputs: torch.Tensor = model.generate(
        input_ids=inputs.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
    )
    return outputs[:, width:].cpu()


def _answer(tokenizer: PreTrainedTokenizerBase, row: list[int], settings: GenerationConfig) -> Answer:
    """The tokens before the first that ends the text; after it comes padding to the batch's longest."""
    length = next((place for place, token in enumerate(row) if token in settings.eos_token_id), len(row))
    text: str = tokenizer.decode(row[:length], skip_special_tokens=True)
    return Answer(text, length, length < len(row))


@contextmanager
def _greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> Iterator[GenerationConfig]:
    """Evaluation mode, and nothing of the model's own generation settings, for a while."""
    unwrapped = _unwrapped(model)
    own_settings = unwrapped.generation_config
    modes = [(module, module.training) for module in model.modules()]
    ends = _end_tokens(own_settings, tokenizer)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0],
        eos_token_id=ends,
    )
    try:
        # transformers fills what is not given from the model's own settings: a penalty, say.
        unwrapped.generation_config = settings
        model.eval()
        yield settings
    finally:
        unwrapped.generation_config = own_settings
        for module, training in modes:
            module.training = training


def _end_tokens(own_settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = own_settings.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id) if end is not None))


@contextmanager
def default_tokenization(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Keep the padding and truncation that the tokenizer is set to: calling it changes them."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    padding, truncation = getattr(backend, "padding", None), getattr(backend, "truncation", None)
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)
