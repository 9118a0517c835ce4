"""On a GPU, where there is one: locking, decoding with a lock, and forging, at the size of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from benchmarks.apply import ALPHA, DTYPES, Skeleton
from benchmarks.forge import Base, batches_of, make_tokenizer, multiply, run_decoder
from benchmarks.harness import Contender, Settings, compare
from benchmarks.locks import LLAMA_3_8B, LLAMA_3_70B, lock_for
from benchmarks.results import Row
from mlflow_safelock import SafetyLock, apply_lock
from mlflow_safelock.forging import starter_preference_pairs

NEW_TOKENS = 32
PROMPT_TOKENS = 128


def run(settings: Settings) -> Iterator[Row]:
    """Nothing without a GPU; otherwise apply, decode and forge on the first one, in bfloat16."""
    if not torch.cuda.is_available():
        return
    for published in (LLAMA_3_8B, LLAMA_3_70B):
        lock, origin = lock_for(published, settings.shared)
        for name, dtype in DTYPES.items():
            case = f"{published.title}, {name}, {origin} ({len(lock.heads)} heads, {len(lock.layers)} layers)"
            yield _applying(f"apply: {case}", lock, dtype, settings)
            torch.cuda.empty_cache()
    model = _llama_3_8b(settings.quick)
    lock, _ = lock_for(LLAMA_3_8B, settings.shared)
    yield from _decoding(model, lock, settings)
    torch.cuda.empty_cache()
    yield _forging(model, settings)


def _applying(case: str, lock: SafetyLock, dtype: torch.dtype, settings: Settings) -> Row:
    skeleton = Skeleton(lock, dtype, "cuda")
    read = skeleton.locked_bytes
    return compare(
        "gpu",
        case,
        ours=Contender(
            "apply_lock",
            _done(lambda: apply_lock(skeleton.model, lock, ALPHA)),
            lambda handle: handle.remove(),
        ),
        theirs=Contender(
            "F.linear with the whole W_o and a full displacement per layer",
            _done(skeleton.lock_by_whole_matrices),
            lambda _: skeleton.unlock(),
        ),
        limit=Contender(f"gather the locked columns: {read / 1e6:.0f} MB", _done(skeleton.gather)),
        repetitions=settings.repetitions(31),
        figures={"error of ours": skeleton.error_of_ours(), "error of theirs": skeleton.error_of_theirs()},
    )


def _done(work: Callable[[], Any]) -> Callable[[], Any]:
    """Wait for the GPU, too."""

    def timed() -> Any:
        result = work()
        torch.cuda.synchronize()
        return result

    return timed


def _llama_3_8b(quick: bool) -> LlamaForCausalLM:
    """A model of the shape of Llama-3-8B with random weights, in bfloat16 on the GPU."""
    tokenizer = make_tokenizer()
    geometry = LLAMA_3_8B.geometry
    config = LlamaConfig(
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=8,
        head_dim=geometry.head_dim,
        hidden_size=geometry.hidden,
        intermediate_size=64 if quick else 14336,
        vocab_size=len(tokenizer) if quick else 128256,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device("cuda"), no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _decoding(model: LlamaForCausalLM, lock: SafetyLock, settings: Settings) -> Iterator[Row]:
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tokens = 4 if settings.quick else NEW_TOKENS

    def locked(prompts: torch.Tensor) -> None:
        # One model for both: two copies of one lie elsewhere in memory, which tells more than a lock.
        with apply_lock(model, lock, ALPHA):
            _generate(model, prompts, tokens)

    for batch in (1, 16):
        prompts = torch.randint(3, 1000, (batch, PROMPT_TOKENS), device="cuda")
        yield compare(
            "gpu",
            f"decode: Llama-3-8B, bfloat16, {batch} x {tokens} tokens",
            ours=Contender("locked, with locking and unlocking", _done(partial(locked, prompts))),
            theirs=Contender("unlocked", _done(partial(_generate, model, prompts, tokens))),
            limit=Contender(
                f"read the {weights / 1e9:.1f} GB of weights once for each token",
                _done(lambda: [parameter.sum() for parameter in model.parameters()]),
                times=tokens,
            ),
            repetitions=settings.repetitions(15),
        )


@torch.inference_mode()
def _generate(model: LlamaForCausalLM, prompts: torch.Tensor, tokens: int) -> None:
    made = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
    )
    assert made.shape[1] == prompts.shape[1] + tokens


def _forging(model: LlamaForCausalLM, settings: Settings) -> Row:
    pairs = starter_preference_pairs()[: 10 if settings.quick else 100]
    base = Base(model, make_tokenizer(), pairs, LLAMA_3_8B.geometry)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    base.forge()
    peak = torch.cuda.max_memory_allocated() - before
    batches = batches_of(base)
    tokens = [int(batch["attention_mask"].numel()) for batch in batches]
    weights = [module.weight for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    shape = f"{base.geometry}, bfloat16, {len(pairs)} pairs, {len(batches)} batches, {sum(tokens)} tokens"
    return compare(
        "gpu",
        f"forge: {shape}",
        ours=Contender("forge, from pairs to lock", _done(base.forge)),
        theirs=Contender(
            "the decoder on the same batches, no logits", _done(lambda: run_decoder(model, batches))
        ),
        limit=Contender(
            "the products with the decoder's weights alone", _done(lambda: multiply(weights, tokens))
        ),
        repetitions=settings.repetitions(3),
        figures={"peak beside the model, MB": peak / 1e6, "buffer by the formula, MB": base.buffer / 1e6},
    )
