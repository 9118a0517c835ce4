"""Forging takes the memory that docs/forging.md states: the buffer of activations, and little more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAIRS, LAST_TOKENS, LAYERS, HEADS, HEAD_DIM = 25, 20, 16, 32, 128
BUFFER = 2 * PAIRS * LAST_TOKENS * LAYERS * HEADS * HEAD_DIM * 4
MEASURED = f"""
from pathlib import Path
import torch
from mlflow_safelock.forging import forge, starter_preference_pairs
from tests.models import CHATML, tiny_model, tiny_tokenizer

def kilobytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0])

torch.set_num_threads(2)
model = tiny_model(
    "llama", num_hidden_layers={LAYERS}, num_attention_heads={HEADS}, head_dim={HEAD_DIM}, hidden_size=64,
    max_position_embeddings=512,
)
tokenizer, pairs = tiny_tokenizer(CHATML), starter_preference_pairs()[:{PAIRS}]
loaded = max(kilobytes("VmHWM"), kilobytes("VmRSS"))
lock = forge(model, tokenizer, pairs, last_tokens={LAST_TOKENS}, batch_size=2, progress=False)
assert lock.sketch is not None
print((kilobytes("VmHWM") - loaded) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the kernel does not say what was used")
def test_peak_memory_is_the_buffer_and_a_constant() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], env={**os.environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used = int(done.stdout.split()[-1])
    print(f"{used / 1e6:.0f} MB beside a buffer of {BUFFER / 1e6:.0f} MB")
    assert BUFFER <= used < BUFFER + 200e6, f"{used / 1e6:.0f} MB, and the buffer is {BUFFER / 1e6:.0f} MB"
