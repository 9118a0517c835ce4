from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mlflow_safelock.errors import ForgeError, LockValidationError
from mlflow_safelock.forging import UNKNOWN_BASE, forge_from_activations, probe_activations, split_by_pair
from mlflow_safelock.forging.making import forged_metadata
from mlflow_safelock.formats import lock_from_bytes, lock_to_bytes
from mlflow_safelock.lock import AttentionGeometry, SafetyLock
from tests import reference

SAMPLE = reference.sample(0)
WHEN = "2026-01-31T12:00:00+00:00"


def forged(sample: reference.Sample = SAMPLE, **changes: Any) -> SafetyLock:
    settings = {"heads": 4, "created": WHEN} | changes
    return forge_from_activations(sample.activations, sample.labels, **settings)


def check_against(lock: SafetyLock, scores: np.ndarray, heads: list, directions: Any, stds: Any) -> None:
    assert lock.scores is not None
    np.testing.assert_allclose(lock.scores, scores, rtol=0, atol=1e-6)
    ranked = lock.ranked_heads()
    assert [(locked.layer, locked.head) for locked in ranked] == heads
    for locked, direction, std in zip(ranked, directions, stds, strict=True):
        np.testing.assert_allclose(locked.direction, direction, rtol=0, atol=1e-6)
        assert locked.std == pytest.approx(std, abs=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["golden_a", "golden_b"])
def test_the_lock_is_the_golden_one(shared: Path, name: str) -> None:
    golden = load_file(shared / "golden" / f"{name}.safetensors")
    heads = [tuple(place) for place in golden["top_heads"].tolist()]
    lock = forge_from_activations(
        golden["activations"],
        golden["labels"],
        heads=len(heads),
        train_rows=golden["train_rows"],
        val_rows=golden["val_rows"],
        hidden=golden["o_proj"].shape[1],
    )
    check_against(lock, golden["scores"], heads, golden["directions"], golden["stds"])
    assert lock.geometry.hidden == golden["o_proj"].shape[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("split", ["given", "pair", "row"])
def test_the_lock_is_that_of_the_reference(seed: int, split: str) -> None:
    sample = reference.sample(seed)
    train, validation = sample.train_rows, sample.val_rows
    if split == "given":
        lock = forged(sample, heads=7, train_rows=train, val_rows=validation)
    else:
        lock = forged(sample, heads=7, split=split, seed=seed)
        train, validation = drawn(sample, split, seed)
    scores = reference.probe_scores(sample.activations, sample.labels, train, validation)
    heads = reference.top_heads(scores, 7)
    found = [
        reference.direction_and_std(sample.activations[:, layer, head], sample.labels)
        for layer, head in heads
    ]
    check_against(lock, scores, heads, *zip(*found, strict=True))


def drawn(sample: reference.Sample, split: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The documented draw: the first 60 % of a permutation by NumPy's default generator."""
    rows = np.arange(len(sample.labels))
    unit = rows // 8 if split == "pair" else rows
    units = unit.max() + 1
    train = np.isin(unit, np.random.default_rng(seed).permutation(units)[: round(0.6 * units)])
    return rows[train], rows[~train]


def test_the_lock_says_how_it_was_made() -> None:
    lock = forged(
        base_model="example/base",
        base_revision="abc",
        architecture="llama",
        hidden=40,
        seed=9,
        train_fraction=0.5,
        system_prompt="Be kind.",
        dataset_digest="sha256:" + "0" * 64,
        default_alpha=4,
    )
    about = lock.metadata
    assert about.geometry == AttentionGeometry(layers=3, heads=5, head_dim=6, hidden=40)
    assert (about.base_model, about.base_revision, about.architecture) == ("example/base", "abc", "llama")
    assert (about.origin, about.split, about.seed, about.train_fraction) == ("forged", "pair", 9, 0.5)
    assert (about.pairs, about.last_tokens) == (30, 4)
    assert (about.system_prompt, about.dataset_digest) == ("Be kind.", "sha256:" + "0" * 64)
    assert (about.default_alpha, about.created) == (4.0, WHEN)
    assert about.tools is not None
    assert about.tools["torch"] == torch.__version__
    assert set(about.tools) == {"mlflow-safelock", "numpy", "torch", "transformers"}


def test_what_is_not_known_is_recorded_as_not_known() -> None:
    about = forged(train_rows=SAMPLE.train_rows, val_rows=SAMPLE.val_rows).metadata
    assert about.base_model == UNKNOWN_BASE == "unknown"
    assert (about.split, about.seed, about.pairs, about.last_tokens) == ("given", None, None, None)
    assert about.train_fraction == pytest.approx(0.6)
    assert about.geometry.hidden == 30
    row = forged(split="row", pairs=np.arange(240) // 8, last_tokens=4).metadata
    assert (row.split, row.seed, row.pairs, row.last_tokens) == ("row", 0, 30, 4)


def test_the_time_is_now_where_none_is_given() -> None:
    assert forged(created=None).metadata.created > WHEN


def test_the_same_arguments_give_the_same_digest_and_others_another() -> None:
    assert forged().digest == forged().digest
    for change in ({"seed": 1}, {"heads": 5}, {"split": "row"}, {"base_model": "b"}, {"default_alpha": 5.0}):
        assert forged(**change).digest != forged().digest


def test_the_lock_can_be_stored() -> None:
    lock = forged()
    assert lock_from_bytes(lock_to_bytes(lock)) == lock


@pytest.mark.parametrize(
    "activations",
    [
        torch.from_numpy(SAMPLE.activations),
        torch.from_numpy(SAMPLE.activations).requires_grad_(),
        SAMPLE.activations.astype(np.float64),
        torch.from_numpy(SAMPLE.activations).transpose(1, 2).contiguous().transpose(1, 2),
    ],
    ids=["tensor", "with gradient", "float64", "strided"],
)
def test_activations_may_be_arrays_or_tensors(activations: Any) -> None:
    assert forge_from_activations(activations, SAMPLE.labels, heads=4, created=WHEN) == forged()


def test_a_read_only_array_is_read_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    activations, labels = SAMPLE.activations.copy(), SAMPLE.labels.copy()
    activations.flags.writeable = labels.flags.writeable = False
    assert forge_from_activations(activations, labels, heads=4, created=WHEN) == forged()
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    "labels",
    [
        SAMPLE.labels.tolist(),
        SAMPLE.labels.astype(bool),
        torch.from_numpy(SAMPLE.labels).bool(),
        SAMPLE.labels.astype(np.float32),
        tuple(bool(label) for label in SAMPLE.labels),
    ],
    ids=["list", "bool array", "bool tensor", "floats", "tuple of bools"],
)
def test_labels_may_be_any_ones_and_zeros(labels: Any) -> None:
    assert forge_from_activations(SAMPLE.activations, labels, heads=4, created=WHEN) == forged()


def test_rows_in_another_order_need_the_numbers_of_their_pairs() -> None:
    order = np.random.default_rng(0).permutation(240)
    shuffled = reference.Sample(
        SAMPLE.activations[order], SAMPLE.labels[order], *[SAMPLE.train_rows] * 2, SAMPLE.o_proj
    )
    with pytest.raises(ForgeError, match="do not show which rows belong to one pair") as caught:
        forged(shuffled)
    assert "pairs=..." in str(caught.value)
    ordered, reordered = forged(), forged(shuffled, pairs=(np.arange(240) // 8)[order], last_tokens=4)
    assert reordered.metadata == ordered.metadata
    np.testing.assert_array_equal(reordered.scores, ordered.scores)
    for one, other in zip(reordered.heads, ordered.heads, strict=True):
        assert (one.layer, one.head) == (other.layer, other.head)
        np.testing.assert_allclose(one.direction, other.direction, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1] * 120,
        [1] * 100 + [0] * 140,
        [*([1, 1, 0, 0] * 60)[:-1], 1],
        [1, 0, 0, 1] * 60,
        [0] * 240,
    ],
)
def test_labels_that_are_not_laid_out_pair_by_pair_do_not_pass_for_it(labels: list[int]) -> None:
    with pytest.raises(ForgeError, match="not laid out pair by pair"):
        forge_from_activations(SAMPLE.activations, labels, heads=4)


@pytest.mark.parametrize("labels", [[1] * 120 + [0] * 120, [1] * 240])
def test_one_pair_is_too_few(labels: list[int]) -> None:
    with pytest.raises(ForgeError, match=r"too few|pair by pair"):
        forge_from_activations(SAMPLE.activations, labels, heads=4)


def test_one_class_is_refused_in_every_split() -> None:
    ones = np.ones(240, dtype=int)
    for split in (
        {"split": "row"},
        {"pairs": np.arange(240) // 8},
        {"train_rows": range(100), "val_rows": range(100, 240)},
    ):
        with pytest.raises(ForgeError, match="answers of one kind only"):
            forge_from_activations(SAMPLE.activations, ones, heads=4, **split)


def changed(place: tuple[int, ...], value: float) -> np.ndarray:
    activations = SAMPLE.activations.copy()
    activations[place] = value
    return activations


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused_with_their_head(value: float) -> None:
    with pytest.raises(ForgeError, match=r"layer 2, head 3 hold NaN or infinity \(row 17 for one\)"):
        forge_from_activations(changed((17, 2, 3, 0), value), SAMPLE.labels, heads=1)


def test_a_head_without_a_direction_is_refused_where_it_would_be_locked() -> None:
    activations = SAMPLE.activations.copy()
    activations[:, 1, 2] = 0.5
    with pytest.raises(ForgeError, match="Head 2 of layer 1 puts out the same"):
        forge_from_activations(activations, SAMPLE.labels, heads=15)
    assert len(forge_from_activations(activations, SAMPLE.labels, heads=4).heads) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 16}, r"16 heads are asked for, and the model has 15 \(3 layers x 5 heads"),
        ({"heads": 0}, "heads must be a whole number above zero, not 0"),
        ({"heads": 2.0}, "heads must be a whole number"),
        ({"heads": True}, "heads must be a whole number"),
        ({"split": "rows"}, "split must be 'pair' or 'row', not 'rows'"),
        ({"split": "given"}, "split must be 'pair' or 'row', not 'given'"),
        ({"train_rows": [1, 2]}, "only make a split together"),
        ({"train_rows": [0, 1, 4, 5], "val_rows": [4, 8]}, "row 4 for one"),
        ({"train_rows": [0, 4], "val_rows": [1, 240]}, "holds row 240"),
        ({"pairs": np.arange(239)}, "one whole number for each of the 240 rows"),
        ({"pairs": np.arange(240) / 2}, "one whole number for each of the 240 rows"),
        ({"train_fraction": 0.001}, "30 pairs are too few"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ForgeError, match=message):
        forged(**changes)


@pytest.mark.parametrize(
    ("activations", "message"),
    [
        (SAMPLE.activations.astype(np.int32), "floating numbers"),
        (SAMPLE.activations.tolist(), "floating numbers"),
        (SAMPLE.activations.astype(np.longdouble), "floating numbers"),
        (SAMPLE.activations.astype(complex), "floating numbers"),
        (SAMPLE.activations[:, 0], r"shape \[rows, layers, heads, head_dim\], not \[240, 5, 6\]"),
        (SAMPLE.activations[:, :, :0], r"not \[240, 3, 0, 6\]"),
    ],
)
def test_activations_of_another_kind_are_refused(activations: Any, message: str) -> None:
    with pytest.raises(ForgeError, match=message):
        forge_from_activations(activations, SAMPLE.labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (SAMPLE.labels[:-1], "one number for each of the 240 rows"),
        (SAMPLE.labels[:, None], "one number for each of the 240 rows"),
        (["safe"] * 240, "one number for each of the 240 rows"),
        (SAMPLE.labels * 2, "1 for safe and 0 for unsafe, and 2 is among them"),
        (SAMPLE.labels * 2 - 1, "-1 is among them"),
        (SAMPLE.labels * 0.5, r"0\.5 is among them"),
        (np.where(SAMPLE.labels == 1, np.nan, 0.0), "nan is among them"),
    ],
)
def test_labels_of_another_kind_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(ForgeError, match=message):
        forge_from_activations(SAMPLE.activations, labels)


def test_a_value_that_a_lock_cannot_record_is_refused() -> None:
    with pytest.raises(LockValidationError, match="created"):
        forged(created="yesterday")
    with pytest.raises(LockValidationError, match="dataset_digest"):
        forged(dataset_digest="md5:0")
    with pytest.raises(LockValidationError, match="default_alpha"):
        forged(default_alpha=-1.0)


def test_locks_of_several_sizes_come_out_of_one_probing() -> None:
    rows = split_by_pair(np.arange(240) // 8, 0.6, 0)
    geometry = AttentionGeometry(layers=3, heads=5, head_dim=6, hidden=30)
    metadata = forged_metadata(
        rows,
        base_model=None,
        base_revision=None,
        architecture=None,
        geometry=geometry,
        last_tokens=4,
        pairs=30,
        system_prompt=None,
        dataset_digest=None,
        default_alpha=6.0,
        created=WHEN,
    )
    probed = probe_activations(
        torch.from_numpy(SAMPLE.activations), torch.from_numpy(SAMPLE.labels), rows, metadata
    )
    for heads in (1, 4, 15):
        assert probed.lock(heads) == forged(heads=heads)
    small, large = ({(h.layer, h.head) for h in probed.lock(heads).heads} for heads in (4, 9))
    assert small < large
    with pytest.raises(ForgeError, match="16 heads are asked for"):
        probed.lock(16)
