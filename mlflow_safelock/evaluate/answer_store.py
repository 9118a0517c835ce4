"""Answers kept as they come, so that an evaluation that was cut off goes on where it was.

A file holds the answers of one arm. It is named by a digest of everything that decides an answer, and an
answer in it by the text that the model was given, so a file is never read for something else than it was
written for.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rfc8785

from mlflow_safelock.apply.generation import Answer
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.unicode import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 256
"""Numbers of each tensor that a model is told apart by."""

_LINE: Mapping[str, type] = {"asked": str, "text": str, "tokens": int, "finished": bool}
"""What a line of a file of answers holds: the digest of what was asked, and the answer's own fields."""


class AnswerStore:
    """The answers of one arm that are there already, and a place for more.

    Args:
        folder: Folder of all such files; made where it is not there.
        key: Everything that decides the answers, as plain values.

    Raises:
        EvaluationError: The file cannot be read or written.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.path = folder / f"{hashlib.sha256(rfc8785.dumps(dict(key))).hexdigest()[:32]}.jsonl"
        self.answers: dict[str, Answer] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read()
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> EvaluationError:
        return EvaluationError(
            f"The answers in {self.path} cannot be kept: {error.strerror or error}.",
            next_step="Make room there, or name another file to write to; what was kept is used again.",
        )

    def add(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, by the text that the model was given; they are on disk afterwards."""
        lines = [json.dumps({"asked": _digest(asked), **asdict(answer)}) for asked, answer in answers.items()]
        try:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in lines))
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise self._unusable(error) from error
        self.answers |= {_digest(asked): answer for asked, answer in answers.items()}

    def find(self, asked: str) -> Answer | None:
        """The answer to a text that the model is given, where it is there."""
        return self.answers.get(_digest(asked))

    def _read(self) -> None:
        whole = 0
        data = self.path.read_bytes()
        for line in data.splitlines(keepends=True):
            kept = _kept(line)
            if kept is None:
                break
            self.answers |= kept
            whole += len(line)
        if whole < len(data):
            # Whoever wrote the last line died in the midst of it.
            with self.path.open("r+b") as stream:
                stream.truncate(whole)


def _kept(line: bytes) -> dict[str, Answer] | None:
    """What a line of a file of answers holds; ``None`` where it is none that ``add`` wrote to its end."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(row, dict) and {name: type(value) for name, value in row.items()} == _LINE
    if not sound or row["tokens"] < 0 or not is_unicode(row["text"]) or not line.endswith(b"\n"):
        return None
    return {row.pop("asked"): Answer(**row)}


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether accelerate keeps weights elsewhere between two uses."""
    return any(tensor.device.type == "meta" for tensor in model.state_dict().values())


def sample_digest(model: PreTrainedModel) -> str:
    """A digest that tells loaded models apart, whatever they were loaded from: some numbers of each weight.

    The places are drawn by the tensor's name and shape, so they are always the same, and this is no
    fingerprint that could prove anything; two models that were trained differently differ nearly everywhere.
    """
    import torch

    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        called = f"{name} {tuple(tensor.shape)}"
        state.update(f"{called} {tensor.dtype}\n".encode())
        if tensor.numel() and tensor.device.type != "meta":
            # Evenly spaced places would all lie in one column of many a matrix.
            drawn = random.Random(called).sample(  # noqa: S311 - no secret
                range(tensor.numel()), min(SAMPLES, tensor.numel())
            )
            places = torch.tensor(drawn, device=tensor.device)
            sample = tensor.detach().reshape(-1)[places].cpu().contiguous()
            state.update(sample.view(torch.uint8).numpy().tobytes())
    return f"sha256:{state.hexdigest()}"


def decisive(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides answers besides the weights and the text that is asked, as plain values for a key."""
    unwrapped: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapters = getattr(model, "peft_config", None) or {}
    return {
        "config": _digest_of({**unwrapped.config.to_dict(), "_name_or_path": None}),
        "attention": getattr(unwrapped.config, "_attn_implementation", None),
        "adapters": {name: _digest_of(adapter.to_dict()) for name, adapter in adapters.items()},
        "active_adapters": str(getattr(model, "active_adapters", None)) if adapters else None,
        "ends": [unwrapped.generation_config.eos_token_id, tokenizer.eos_token_id],
        "padding": [unwrapped.generation_config.pad_token_id, tokenizer.pad_token_id],
        "tokenizer": _tokenizer_digest(tokenizer),
        "special_tokens": not tokenizer.chat_template,
    }


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _digest_of([type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map])
    # How it pads and cuts is set anew for every use.
    return _digest_of({**json.loads(backend.to_str()), "padding": None, "truncation": None})


def _digest_of(value: Any) -> str:
    return _digest(json.dumps(value, sort_keys=True, default=str))


def _digest(asked: str) -> str:
    return hashlib.sha256(asked.encode("utf-8", "surrogatepass")).hexdigest()
