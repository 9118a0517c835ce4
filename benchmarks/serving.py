"""What a lock costs where the model is used: loading it, and every token."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchmarks.harness import Contender, Settings, compare
from benchmarks.registries import SMALL, large, location, log_fine_tune, open_folder, register_lock
from benchmarks.results import Row

NAME = "served"
PROMPT_TOKENS = 16


def run(settings: Settings) -> Iterator[Row]:
    """Load and generate with a locked version of a fine-tune and with an unlocked one."""
    client, _ = open_folder(settings.scratch / "registry")
    geometry = large(settings.megabytes) if not settings.quick else SMALL
    lock = register_lock(geometry)
    fine_tune = log_fine_tune(geometry)
    client.create_registered_model(NAME)
    locked, unlocked = (fine_tune.new_version(client, NAME) for _ in range(2))
    source = location(client, NAME, unlocked)
    client.transition_model_version_stage(NAME, locked, "Staging")
    size = sum(path.stat().st_size for path in (source / "model").glob("*.safetensors"))
    case = f"{size / 1e6:.0f} MB of weights, {len(lock.layers)} of {geometry.layers} layers locked"
    with _own_temporary_folder(settings.scratch):
        yield _loading(case, locked, unlocked, source, settings)
        yield _loading_to_the_first_token(case, locked, unlocked, source, settings)
    yield from _generating(case, locked, unlocked, settings)


def _loading(case: str, locked: str, unlocked: str, source: Path, settings: Settings) -> Row:
    return compare(
        "serving",
        f"load: {case}",
        ours=Contender("mlflow.pyfunc.load_model, locked", lambda: _load(locked), _forget),
        theirs=Contender("mlflow.pyfunc.load_model, unlocked", lambda: _load(unlocked), _forget),
        limit=Contender("transformers alone: from_pretrained", lambda: _load_stock(source)),
        repetitions=settings.repetitions(15),
    )


def _loading_to_the_first_token(
    case: str, locked: str, unlocked: str, source: Path, settings: Settings
) -> Row:
    """A load by itself maps the weights and reads none: whoever reads them first pays for the pages."""
    return compare(
        "serving",
        f"load, and one token: {case}",
        ours=Contender("locked", lambda: _one_token(_load(locked).get_raw_model().model), _forget),
        theirs=Contender("unlocked", lambda: _one_token(_load(unlocked).get_raw_model().model), _forget),
        limit=Contender(
            "transformers alone: from_pretrained, and one token",
            lambda: _one_token(_load_stock(source)[0]),
        ),
        repetitions=settings.repetitions(11),
    )


def _one_token(model: Any) -> None:
    _generate(model, 1, 1)


def _generating(case: str, locked: str, unlocked: str, settings: Settings) -> Iterator[Row]:
    with_lock, without_lock = (_load(version).get_raw_model().model for version in (locked, unlocked))
    _check(with_lock, without_lock)
    tokens = 4 if settings.quick else 32
    size = sum(parameter.nbytes for parameter in without_lock.parameters())
    limit = Contender(
        f"read the weights once per token: {size * tokens / 1e9:.2g} GB",
        lambda: _read(without_lock),
        times=tokens,
    )
    for batch in (1, 8):
        row = compare(
            "serving",
            f"generate {batch} x {tokens} tokens: {case}",
            ours=Contender("locked", partial(_generate, with_lock, batch, tokens)),
            theirs=Contender("unlocked", partial(_generate, without_lock, batch, tokens)),
            limit=limit,
            repetitions=settings.repetitions(11),
        )
        figures = {
            "tokens/s locked": batch * tokens / row.ours.median,
            "tokens/s unlocked": batch * tokens / row.theirs.median,
        }
        yield row.model_copy(update={"figures": figures})


def _load(version: str) -> Any:
    return mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")


@contextmanager
def _own_temporary_folder(folder: Path) -> Iterator[None]:
    """Let what is downloaded go below ``folder``, where it is this benchmark's to remove."""
    before, folder = tempfile.tempdir, folder / "temporary"
    folder.mkdir(parents=True)
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _forget(_model: Any) -> None:
    """Remove what the load has downloaded."""
    for path in Path(tempfile.gettempdir()).iterdir():
        shutil.rmtree(path, ignore_errors=True)


def _load_stock(source: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(source / "model", dtype="auto")
    return model, AutoTokenizer.from_pretrained(source / "components" / "tokenizer")


def _check(with_lock: Any, without_lock: Any) -> None:
    biased = [
        any(name.endswith("o_proj.bias") for name, _ in model.named_parameters())
        for model in (with_lock, without_lock)
    ]
    if biased != [True, False]:
        raise AssertionError("The two models are not a locked and an unlocked one.")


def _generate(model: Any, batch: int, tokens: int) -> None:
    inputs = torch.arange(batch * PROMPT_TOKENS).view(batch, PROMPT_TOKENS) % 256 + 4
    settings = GenerationConfig(
        do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0, eos_token_id=3
    )
    output = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
    if output.shape[1] != PROMPT_TOKENS + tokens:
        raise AssertionError("Fewer tokens were generated than are counted.")


@torch.no_grad()
def _read(model: Any) -> int:
    """Read every byte of the weights."""
    return sum(int(parameter.view(torch.int16).amax()) for parameter in model.parameters())
