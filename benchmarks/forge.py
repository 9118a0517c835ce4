"""Forging a lock, or no more than the forward passes that it cannot do without."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.harness import Contender, Settings, compare
from benchmarks.results import Row
from mlflow_safelock import forge
from mlflow_safelock.forging import PreferencePair, starter_preference_pairs
from mlflow_safelock.lock import AttentionGeometry
from tests.models import CHATML, tiny_tokenizer

USUAL = AttentionGeometry(layers=8, heads=16, head_dim=64, hidden=1024)
SMALL = AttentionGeometry(layers=2, heads=4, head_dim=16, hidden=64)
LAST_TOKENS = 5
BATCH_SIZE = 8

_MEASURED = """
import sys
from benchmarks import forge
print(forge.peak_of_a_forge(sys.argv[1] == "quick"))
"""


@dataclass(frozen=True, eq=False)
class Base:
    """A random base model and what a lock of it is forged from.

    Attributes:
        model: A Llama in float32.
        tokenizer: A tokenizer that makes about as many tokens of English as those of real models.
        pairs: Preference pairs.
        geometry: The model's attention shape.
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    pairs: Sequence[PreferencePair]
    geometry: AttentionGeometry

    @property
    def buffer(self) -> int:
        """Bytes of the activations, by the formula of docs/forging.md."""
        geometry = self.geometry
        rows = 2 * len(self.pairs) * LAST_TOKENS
        return rows * geometry.layers * geometry.heads * geometry.head_dim * 4

    def forge(self) -> None:
        """All of it: chats, passes, probes, directions, what is kept of the weights."""
        forge(
            self.model,
            self.tokenizer,
            self.pairs,
            heads=min(24, self.geometry.layers * self.geometry.heads // 2),
            last_tokens=LAST_TOKENS,
            batch_size=BATCH_SIZE,
            base_model="benchmark/base",
            progress=False,
        )


def run(settings: Settings) -> Iterator[Row]:
    """Forge in float32 on the CPU, against the decoder on the same batches."""
    base = make_base(settings.quick)
    batches = batches_of(base)
    tokens = [int(batch["attention_mask"].numel()) for batch in batches]
    filled = sum(int(batch["attention_mask"].sum()) for batch in batches)
    weights = [
        module.weight for module in base.model.model.layers.modules() if isinstance(module, torch.nn.Linear)
    ]
    operations = 2 * sum(weight.numel() for weight in weights) * sum(tokens)
    yield compare(
        "forge",
        f"{base.geometry}, float32, {len(base.pairs)} pairs: {len(batches)} batches, {sum(tokens)} tokens",
        ours=Contender("forge, from pairs to lock", base.forge),
        theirs=Contender(
            "the decoder on the same batches, no logits", lambda: run_decoder(base.model, batches)
        ),
        limit=Contender(
            f"the products with the decoder's weights alone: {operations / 1e12:.3g} TFLOP",
            lambda: multiply(weights, tokens),
        ),
        repetitions=settings.repetitions(3),
        figures={
            "tokens that fill up batches, %": 100.0 * (1.0 - filled / sum(tokens)),
            "peak memory beside the model, MB": _peak_in_a_process_of_its_own(settings.quick),
            "of that the buffer, MB": base.buffer / 1e6,
        },
        cpu=True,
    )


def make_base(quick: bool) -> Base:
    """The base that is forged from; always the same."""
    geometry = SMALL if quick else USUAL
    pairs = starter_preference_pairs()[: 10 if quick else 100]
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=geometry.hidden,
        intermediate_size=2 * geometry.hidden,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.heads,
        head_dim=geometry.head_dim,
    )
    torch.manual_seed(0)
    return Base(LlamaForCausalLM(config).eval(), tokenizer, pairs, geometry)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that makes about as many tokens of English as those of real models; always the same."""
    texts = [text for pair in starter_preference_pairs() for text in (pair.question, pair.safe, pair.unsafe)]
    tokenizer = tiny_tokenizer(CHATML).train_new_from_iterator(texts, 2048)
    tokenizer.chat_template = CHATML
    return tokenizer


def peak_of_a_forge(quick: bool) -> float:
    """The most memory that a forge takes beside the model, in MB, in a process that forges nothing else."""
    base = make_base(quick)
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    base.forge()
    return (_kilobytes("VmHWM") - before) * 1024 / 1e6


def batches_of(base: Base) -> list[dict[str, Any]]:
    """What a forge gives to the decoder."""
    batches: list[dict[str, Any]] = []
    hook = base.model.model.register_forward_pre_hook(
        lambda _module, _arguments, inputs: batches.append(inputs), with_kwargs=True
    )
    base.forge()
    hook.remove()
    return batches


@torch.inference_mode()
def run_decoder(model: LlamaForCausalLM, batches: Sequence[dict[str, Any]]) -> None:
    """The passes that a forge cannot do without."""
    for batch in batches:
        model.model(**batch)


@torch.inference_mode()
def multiply(weights: Sequence[torch.Tensor], tokens: Sequence[int]) -> None:
    """Every weight times as many columns as each batch has tokens."""
    for count in tokens:
        for weight in weights:
            functional.linear(weight.new_ones(count, weight.shape[1]), weight)


def _peak_in_a_process_of_its_own(quick: bool) -> float:
    command = [sys.executable, "-c", _MEASURED, "quick" if quick else "usual"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def _kilobytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])
