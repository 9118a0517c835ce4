"""Lock files of every released format stay readable for ever.

The files in ``golden/`` are never rewritten. A new format version adds files, and this page keeps reading the
old ones. They were written from the locks below by ``save_lock`` of the version in their name.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlflow_safelock.formats import load_lock, lock_to_bytes
from mlflow_safelock.kinship import KinshipSketch
from mlflow_safelock.lock import AttentionGeometry, LockedHead, LockMetadata, SafetyLock
from mlflow_safelock.vocabulary import VocabularyDigest

GOLDEN = Path(__file__).parent / "golden"


def forged() -> SafetyLock:
    """Every field known, with text that encoders differ on."""
    metadata = LockMetadata(
        base_model="example/grüße-7b",
        base_revision="5f0b1c2",
        architecture="llama",
        geometry=AttentionGeometry(layers=2, heads=3, head_dim=4, hidden=16),
        origin="forged",
        last_tokens=5,
        pairs=100,
        split="pair",
        train_fraction=0.6,
        seed=2**53 - 1,
        system_prompt='Be kind: "always" \\ \t\n\x01 – “so” 😀\u2028',
        dataset_digest="sha256:" + "0123456789abcdef" * 4,
        default_alpha=5.5,
        created="2026-01-31T12:00:00+00:00",
        tools={"😀": "1", "é": "2", "torch": "2.13.0"},
    )
    heads = (
        LockedHead(0, 2, np.array([0.5, -0.5, 0.5, -0.5], dtype=np.float32), 0.1),
        LockedHead(1, 0, np.array([0.6, 0.0, -0.8, 0.0], dtype=np.float32), 1e-300),
        LockedHead(1, 1, np.array([0.0, 0.0, 0.0, -1.0], dtype=np.float32), 12345.678),
    )
    return SafetyLock(heads, metadata, np.array([[0.5, 0.25, 1], [0.75, 0.875, 0]], dtype=np.float32))


def sketched() -> SafetyLock:
    """What is kept of the base's weights as well."""
    lock = forged()
    return SafetyLock(
        lock.heads,
        lock.metadata,
        lock.scores,
        (np.arange(48, dtype=np.float32).reshape(3, 16) / 7).astype(np.float32),
        KinshipSketch(
            np.array([0, 1], dtype=np.int32),
            np.array([[0, 100], [7, 189]], dtype=np.int64),
            np.array([[[1, -2, 0.5], [0, 65504, 6e-8]], [[3, 4, 5], [-6, 0.1, 9]]], dtype=np.float16),
        ),
    )


def published() -> SafetyLock:
    """As little known as there can be."""
    metadata = LockMetadata(
        base_model="example/base",
        base_revision=None,
        architecture=None,
        geometry=AttentionGeometry(layers=80, heads=64, head_dim=3, hidden=8192),
        origin="published",
        last_tokens=None,
        pairs=None,
        split=None,
        train_fraction=None,
        seed=None,
        system_prompt=None,
        dataset_digest=None,
        default_alpha=6.0,
        created=None,
        tools=None,
    )
    return SafetyLock((LockedHead(79, 63, np.array([0, 1, 0], dtype=np.float32), 0.375),), metadata)


def with_tokenizer() -> SafetyLock:
    """What is known of the base's tokenizer as well, which is written as version 2."""
    lock = sketched()
    known = VocabularyDigest(
        ids=((3, 128_000), (128_256, 128_257)), merges=280_147, digest="sha256:" + "fedcba9876543210" * 4
    )
    return replace(lock, metadata=lock.metadata.model_copy(update={"tokenizer": known}))


RELEASED = {
    "v1-forged.safetensors": (
        forged,
        "sha256:b12593f33e7562de63bec569f30d0db61a91ebc6f7a27993e3af27cdefd0a3a5",
        "ef4759cc41a2f4986afd0eca0b676e6a1fa85d9c34e86e6ba942231a3d00841e",
    ),
    "v1-sketched.safetensors": (
        sketched,
        "sha256:b3b7eeec433ddae7b53b516fd7959e3e92c36576d83a808eb8d98fd633b0cc92",
        "d9ac034d5028a47a65a2984d41ece5e1ef2b2109dc403c7e64bcb7d8595445de",
    ),
    "v1-published.safetensors": (
        published,
        "sha256:0473cbf9f6ee3945df2727183a9d348225994e3025c5a2bf7e6a0cf3ee2b2632",
        "4662b3c2a9f6b1bcaa3980032539ec3c1d4d55eba2849707680103e918759a4c",
    ),
    "v2-tokenizer.safetensors": (
        with_tokenizer,
        "sha256:cb5d491faa952d168e3b206c412af2a2f8eac0b3f0218feae5db751426907fee",
        "367df5c3c9f3d59f38899cbb8d67699da6a9414a2f708628b3fdc4193bfe2a42",
    ),
}


def test_every_golden_file_is_read_here():
    assert {path.name for path in GOLDEN.iterdir()} == RELEASED.keys()


@pytest.mark.parametrize("name", RELEASED)
class TestReleasedVersions:
    def test_file_is_the_one_that_was_released(self, name):
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == RELEASED[name][2]

    def test_file_is_read_with_its_digest(self, name):
        assert load_lock(GOLDEN / name).digest == RELEASED[name][1]

    def test_file_says_what_was_written(self, name):
        lock, written = load_lock(GOLDEN / name), RELEASED[name][0]()
        assert lock == written
        assert lock.metadata == written.metadata
        for one, other in zip(lock.heads, written.heads, strict=True):
            assert (one.layer, one.head, one.std) == (other.layer, other.head, other.std)
            assert one.direction.tobytes() == other.direction.tobytes()
        assert (lock.scores is None) == (written.scores is None)

    def test_the_same_lock_is_still_written_the_same(self, name):
        assert lock_to_bytes(RELEASED[name][0]()) == (GOLDEN / name).read_bytes()
