"""vLLM itself, where there is one: a locked folder answers as it does in transformers, and not as its source.

vLLM has an environment of its own; SAFELOCK_VLLM_PYTHON names the Python in it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlflow_safelock.apply import geometry_from_config, save_locked_checkpoint
from tests.apply.checkpoint.vllm_answers import NEW_TOKENS
from tests.models import CHATML, random_lock, tiny_model, tiny_tokenizer

PROMPTS = [list(range(5, 29)), list(range(40, 52))]


@pytest.mark.skipif(
    "SAFELOCK_VLLM_PYTHON" not in os.environ,
    reason="SAFELOCK_VLLM_PYTHON names no Python of an environment with vLLM",
)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "ministral"])
def test_a_locked_folder_answers_as_it_does_in_transformers(family: str, tmp_path: Path) -> None:
    source, locked = tmp_path / "source", tmp_path / "locked"
    tokenizer = tiny_tokenizer(CHATML)
    shape = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "head_dim": 32,  # the least that vLLM has a kernel for on a CPU
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 256,
        **({"sliding_window": 16} if family == "ministral" else {}),
    }
    model = tiny_model(family, **shape)
    with torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.08)  # wide enough that no two tokens are as likely
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    save_locked_checkpoint(
        source, locked, random_lock(geometry_from_config(model.config), heads=4), alpha=6.0
    )
    of_vllm = answers_of_vllm(locked)
    here, unlocked = answers_of_transformers(locked), answers_of_transformers(source)
    assert [answer["tokens"] for answer in of_vllm] == [tokens for tokens, _ in here]
    assert all(tokens != other for (tokens, _), (other, _) in zip(here, unlocked, strict=True))
    for answer, (_, likely) in zip(of_vllm, here, strict=True):
        assert answer["logprobs"] == pytest.approx(likely, abs=1e-4)


def answers_of_vllm(folder: Path) -> list[dict[str, list[float]]]:
    command = [os.environ["SAFELOCK_VLLM_PYTHON"], str(Path(__file__).with_name("vllm_answers.py"))]
    done = subprocess.run(
        [*command, str(folder), json.dumps(PROMPTS)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: list[dict[str, list[float]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def answers_of_transformers(folder: Path) -> list[tuple[list[int], list[float]]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            expected = model(whole).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        tokens = whole[0, len(prompt) :]
        found.append((tokens.tolist(), expected.gather(1, tokens[:, None])[:, 0].tolist()))
    return found
