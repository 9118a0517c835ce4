"""Head outputs at the last tokens of answers (METHOD, forge steps 2 and 3).

Only the input of every attention output projection is looked at, and of that only the last answer tokens are
kept. The decoder runs without its language modelling head, so no logits are computed, and each pass ends at
the last layer's output projection.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from mlflow_safelock.apply import attention_of
from mlflow_safelock.apply.architectures import Attention
from mlflow_safelock.apply.placement import execution_device
from mlflow_safelock.errors import AnswerTokensError, ForgeError
from mlflow_safelock.forging.answer_tokens import AnswerTokens, last_answer_tokens
from mlflow_safelock.forging.cache import reading_key, store_in_memory, store_on_disk
from mlflow_safelock.forging.offloaded import send_back
from mlflow_safelock.forging.preferences import PreferencePair
from mlflow_safelock.forging.progress import tracked
from mlflow_safelock.lock import AttentionGeometry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class HeadActivations:
    """What the heads of a model put out at the last tokens of the answers of preference pairs.

    Rows are ordered pair by pair: the last ``r`` tokens of the safe answer, then those of the unsafe one.

    Attributes:
        values: float32 ``[rows, layers, heads, head_dim]``, on the CPU.
        labels: int64 ``[rows]``; 1 safe, 0 unsafe.
        pairs: int64 ``[rows]``; index of the row's pair.
        geometry: The model's attention shape.
    """

    values: torch.Tensor
    labels: torch.Tensor
    pairs: torch.Tensor
    geometry: AttentionGeometry

    @property
    def last_tokens(self) -> int:
        """How many tokens of each answer gave a row (``r``)."""
        return int((self.pairs == 0).sum()) // 2

    def last(self, tokens: int) -> HeadActivations:
        """Those of fewer tokens of each answer, the last ones: what ``collect_activations`` of so many gives.

        Args:
            tokens: How many, from 1 to ``last_tokens``.

        Returns:
            A copy of these rows.

        Raises:
            ForgeError: There are not so many.
        """
        taken = self.last_tokens
        if not 1 <= tokens <= taken:
            raise ForgeError(f"{taken} last tokens of each answer were recorded, and {tokens} are asked for.")

        def of(rows: torch.Tensor) -> torch.Tensor:
            return rows.view(-1, taken, *rows.shape[1:])[:, -tokens:].flatten(0, 1)

        return HeadActivations(of(self.values), of(self.labels), of(self.pairs), self.geometry)


def collect_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    last_tokens: int = 5,
    system_prompt: str | None = None,
    batch_size: int = 8,
    padding_side: Literal["left", "right"] = "right",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> HeadActivations:
    """Run a model over preference pairs and keep what its heads put out at the answers' last tokens.

    The model is left as it was: modes restored, hooks removed, also when something fails.

    What is kept is one buffer of ``pairs * 2 * last_tokens * layers * heads * head_dim * 4`` bytes: 0.5 GB
    for 100 pairs, 5 tokens and 32 layers x 32 heads x 128; 2.6 GB for 80 x 64 x 128. A forward pass needs,
    beside the weights, what the model needs for ``batch_size`` chats at once.

    Args:
        model: A ``transformers`` model of a known architecture, in any dtype, on any device or several.
        tokenizer: Its tokenizer.
        pairs: The preference pairs.
        last_tokens: How many of each answer's last tokens give a row (``r`` in the paper).
        system_prompt: System prompt of every chat.
        batch_size: Chats in one forward pass; those of like length go together.
        padding_side: Where shorter chats of a batch are filled up. Either way the attention mask and the
            positions keep the filling from having any effect.
        cache: Folder that keeps activations as they are computed, so that a run that was cut off goes on
            where it was, with the same bits, and one that only differs in what is made of them reads
            nothing. It takes as many bytes as the buffer above.
        progress: Whether to show a progress bar.

    Raises:
        AnswerTokensError: An answer has too few tokens, or cannot be found in its chat; with the pair.
        ForgeError: A chat does not fit the model, or the cache cannot be used.
        UnsupportedArchitectureError: The model's attention heads are not known.
    """
    attention = attention_of(model)
    chats = _chats(model, tokenizer, pairs, last_tokens, system_prompt)
    geometry = attention.geometry
    shape = (len(chats), last_tokens, geometry.layers, geometry.heads, geometry.head_dim)
    # Chats of like length together: less padding. The longest first: what does not fit shows at once.
    order = sorted(range(len(chats)), key=lambda index: -len(chats[index].token_ids))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if cache is None:
        store = store_in_memory(shape, len(batches))
    else:
        settings = {"batch_size": batch_size, "padding_side": padding_side}
        key = reading_key(model, geometry, chats, **settings)
        store = store_on_disk(cache, key, shape, len(batches))
    body, values = _body_of(model), store.values
    with _evaluating(model), _recording(attention, values) as record, torch.inference_mode():
        for number, batch in enumerate(tracked(batches, "Reading pairs", progress=progress)):
            if store.done[number]:
                continue
            inputs, positions = _padded([chats[index] for index in batch], padding_side)
            record.start(batch, positions)
            with suppress(_AllSeen):
                _run(model, body, inputs)
            record.finish()
            store.finish(number)
    return HeadActivations(
        values=values.flatten(0, 1),
        labels=torch.tensor([1, 0]).repeat_interleave(last_tokens).repeat(len(pairs)),
        pairs=torch.arange(len(pairs)).repeat_interleave(2 * last_tokens),
        geometry=geometry,
    )


def _chats(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    last_tokens: int,
    system_prompt: str | None,
) -> list[AnswerTokens]:
    """The chats of all pairs, each pair's safe one and its unsafe one."""
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = model.get_input_embeddings().weight.shape[0]
    chats = []
    for number, pair in enumerate(pairs, start=1):
        for side, answer in (("safe", pair.safe), ("unsafe", pair.unsafe)):
            where = f"Pair {number}, {side} answer"
            try:
                chat = last_answer_tokens(
                    tokenizer, pair.question, answer, last_tokens=last_tokens, system_prompt=system_prompt
                )
            except AnswerTokensError as error:
                raise AnswerTokensError(f"{where}: {error.cause}", next_step=error.next_step) from error
            if longest is not None and len(chat.token_ids) > longest:
                raise ForgeError(
                    f"{where}: the chat has {len(chat.token_ids)} tokens, and the model takes {longest}.",
                    next_step="Leave the pair out, or shorten it.",
                )
            if max(chat.token_ids) >= tokens:
                raise ForgeError(
                    f"{where}: the tokenizer gives token {max(chat.token_ids)}, and the model has {tokens}.",
                    next_step="Use the tokenizer that belongs to the model.",
                )
            chats.append(chat)
    return chats


def _padded(
    chats: Sequence[AnswerTokens], side: Literal["left", "right"]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs ``[chats, width]``, and where in them the kept tokens are, ``[chats, last_tokens]``."""
    width = max(len(chat.token_ids) for chat in chats)
    token_ids, mask = torch.zeros(2, len(chats), width, dtype=torch.long)
    kept = []
    for row, chat in enumerate(chats):
        start = width - len(chat.token_ids) if side == "left" else 0
        token_ids[row, start : start + len(chat.token_ids)] = torch.tensor(chat.token_ids)
        mask[row, start : start + len(chat.token_ids)] = 1
        kept.append([start + position for position in chat.positions])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": token_ids, "attention_mask": mask, "position_ids": positions}
    return inputs, torch.tensor(kept)


def _body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model that decodes, without the head that makes logits of it."""
    unwrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: nn.Module = unwrapped.get_decoder()
    return body


def _run(model: PreTrainedModel, body: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    # Some models take no positions, and work them out from the mask.
    taken = inspect.signature(body.forward).parameters
    device = execution_device(model)
    body(use_cache=False, **{name: values.to(device) for name, values in inputs.items() if name in taken})


class _AllSeen(Exception):  # noqa: N818 - ends a forward pass, and is no error
    """Every layer's input was seen: what the model would do from here on is of no use."""


class _Recorder:
    """Puts what goes into the output projections where it belongs in a buffer, and ends the pass with it."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values  # [chats, last_tokens, layers, heads, head_dim]
        self._chats: Sequence[int] = ()
        self._positions = torch.empty(0)
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: list[tuple[int, torch.Tensor]] = []

    def start(self, chats: Sequence[int], positions: torch.Tensor) -> None:
        """From now on, inputs belong to these chats, and the tokens at ``[chats, last_tokens]`` are kept."""
        self._chats, self._positions, self._places, self._seen = chats, positions, {}, []

    def finish(self) -> None:
        """Make sure that every layer's input was seen, once, and keep what was seen.

        A GPU is waited for once in a pass, and not in each layer, where it would then wait in turn.
        """
        layers = self._values.shape[2]
        if sorted(layer for layer, _ in self._seen) != list(range(layers)):
            raise ForgeError(
                f"A forward pass used the output projections of {len(dict(self._seen))} of {layers} layers.",
                next_step="Load the model with transformers' own class, and without skipping layers.",
            )
        device = self._seen[-1][1].device
        kept = torch.stack(
            [outputs.to(device) for _, outputs in sorted(self._seen, key=itemgetter(0))], dim=2
        )
        self._values[list(self._chats)] = (
            kept.cpu().float().reshape(len(self._chats), *self._values.shape[1:])
        )

    def hook(self, layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(_projection: nn.Module, arguments: tuple[Any, ...]) -> None:
            outputs = arguments[0].detach()
            if outputs.device not in self._places:
                rows = torch.arange(len(self._chats), device=outputs.device)[:, None]
                self._places[outputs.device] = rows, self._positions.to(outputs.device)
            self._seen.append((layer, outputs[self._places[outputs.device]]))
            if len(self._seen) == self._values.shape[2]:
                raise _AllSeen

        return keep


@contextmanager
def _recording(attention: Attention, values: torch.Tensor) -> Iterator[_Recorder]:
    recorder = _Recorder(values)
    hooks = []
    try:
        for layer, projection in enumerate(attention.projections):
            hooks.append(projection.register_forward_pre_hook(recorder.hook(layer)))
        yield recorder
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        send_back(model)
        for module, training in modes:
            module.training = training
