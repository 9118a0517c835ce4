"""What a lock is."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import rfc8785
from hypothesis import given, settings
from pydantic import ValidationError

from mlflow_safelock.errors import LockValidationError
from mlflow_safelock.lock import (
    AttentionGeometry,
    LockedHead,
    LockMetadata,
    SafetyLock,
    canonical_metadata,
)
from tests.locks import (
    GEOMETRY,
    any_lock,
    heads,
    make_full_lock,
    make_lock,
    metadata,
    metadata_values,
    scores,
    sketch,
    unit,
    unit_biases,
)

UNIT = unit(1, 2, 2)


class TestLockedHead:
    @pytest.mark.parametrize("name", ["layer", "head"])
    @pytest.mark.parametrize("index", [-1, True, 1.0, "1", None, np.int64(1)])
    def test_index_must_be_a_whole_number_from_zero(self, name, index):
        where = {"layer": 0, "head": 0} | {name: index}
        with pytest.raises(LockValidationError, match=f"{name} must be a whole number"):
            LockedHead(**where, direction=UNIT, std=1.0)

    @pytest.mark.parametrize(
        "direction",
        [
            UNIT.astype(np.float64),
            UNIT.astype(np.float16),
            UNIT.astype(">f4"),
            UNIT[None, :],
            np.float32(1.0),
            [1.0, 0.0],
            None,
        ],
        ids=["float64", "float16", "big-endian", "matrix", "scalar", "list", "none"],
    )
    def test_direction_must_be_a_float32_vector(self, direction):
        with pytest.raises(LockValidationError, match="must be a float32 vector"):
            LockedHead(0, 0, direction, 1.0)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_direction_must_be_finite(self, value):
        with pytest.raises(LockValidationError, match="NaN or infinity"):
            LockedHead(0, 0, np.array([value, 0, 0], dtype=np.float32), 1.0)

    @pytest.mark.parametrize("scale", [0.0, 0.5, 0.9999, 1.0001, 2.0])
    def test_direction_must_have_norm_one(self, scale):
        with pytest.raises(LockValidationError, match=r"norm is .* must be 1"):
            LockedHead(0, 0, (UNIT * scale).astype(np.float32), 1.0)

    def test_empty_direction_has_no_norm_one(self):
        with pytest.raises(LockValidationError, match="norm is 0"):
            LockedHead(0, 0, np.zeros(0, dtype=np.float32), 1.0)

    @pytest.mark.parametrize("std", [np.nan, np.inf, -np.inf, 1, True, "1", None, np.float32(1.0)])
    def test_std_must_be_a_finite_float(self, std):
        with pytest.raises(LockValidationError, match="std must be a finite float"):
            LockedHead(0, 0, UNIT, std)

    @pytest.mark.parametrize("std", [0.0, -0.0, -1.0])
    def test_std_must_be_above_zero(self, std):
        with pytest.raises(LockValidationError, match="std must be above zero"):
            LockedHead(0, 0, UNIT, std)

    def test_error_says_which_head(self):
        with pytest.raises(LockValidationError, match="Head 5 of layer 7"):
            LockedHead(7, 5, UNIT, 0.0)

    def test_head_cannot_be_changed(self):
        source = UNIT.copy()
        head = LockedHead(0, 0, source, 1.0)
        source[0] = 9.0
        assert head.direction.tobytes() == UNIT.tobytes()
        with pytest.raises(FrozenInstanceError):
            head.std = 2.0
        with pytest.raises(ValueError, match="read-only"):
            head.direction[0] = 1.0
        with pytest.raises(ValueError, match="WRITEABLE"):
            head.direction.flags.writeable = True

    def test_std_is_kept_as_a_plain_float(self):
        assert type(LockedHead(0, 0, UNIT, np.float64(0.5)).std) is float

    def test_repr_is_short(self):
        assert repr(LockedHead(7, 5, UNIT, 0.123456)) == "LockedHead(layer=7, head=5, std=0.1235)"


class TestGeometry:
    @pytest.mark.parametrize("name", ["layers", "heads", "head_dim", "hidden"])
    @pytest.mark.parametrize("value", [0, -1, 1.0, True, "8", None, 2**31])
    def test_every_size_must_be_a_positive_whole_number(self, name, value):
        with pytest.raises(ValidationError):
            AttentionGeometry(**{"layers": 1, "heads": 1, "head_dim": 1, "hidden": 1} | {name: value})

    def test_unknown_and_missing_sizes_are_refused(self):
        with pytest.raises(ValidationError, match="kv_heads"):
            AttentionGeometry(layers=1, heads=1, head_dim=1, hidden=1, kv_heads=1)
        with pytest.raises(ValidationError, match="hidden"):
            AttentionGeometry(layers=1, heads=1, head_dim=1)

    def test_geometry_reads_as_people_say_it(self):
        assert str(GEOMETRY) == "3 layers x 4 heads (head_dim 5, hidden 20)"

    def test_geometry_cannot_be_changed(self):
        with pytest.raises(ValidationError, match="frozen"):
            GEOMETRY.layers = 9


class TestMetadata:
    def test_values_are_kept(self):
        values = metadata_values()
        parsed = LockMetadata.parse(values)
        assert {name: getattr(parsed, name) for name in values} == values

    @pytest.mark.parametrize("name", metadata_values())
    def test_every_field_must_be_there(self, name):
        values = metadata_values()
        del values[name]
        with pytest.raises(LockValidationError, match=f"{name}: Field required"):
            LockMetadata.parse(values)

    def test_unknown_field_is_refused(self):
        with pytest.raises(LockValidationError, match="colour"):
            LockMetadata.parse(metadata_values(colour="red"))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("base_model", ""),
            ("base_model", None),
            ("base_model", 7),
            ("base_model", "\ud800"),
            ("base_revision", ""),
            ("architecture", ""),
            ("geometry", None),
            ("geometry", {"layers": 0, "heads": 1, "head_dim": 1, "hidden": 1}),
            ("origin", "stolen"),
            ("origin", None),
            ("last_tokens", 0),
            ("last_tokens", 5.0),
            ("last_tokens", True),
            ("pairs", -1),
            ("pairs", 10**30),
            ("split", "words"),
            ("train_fraction", 0.0),
            ("train_fraction", 1.0),
            ("train_fraction", float("nan")),
            ("train_fraction", "0.6"),
            ("seed", -1),
            ("seed", 2**53),
            ("seed", 0.5),
            ("system_prompt", 3),
            ("dataset_digest", "0a" * 32),
            ("dataset_digest", "sha256:" + "0A" * 32),
            ("dataset_digest", "sha256:" + "0a" * 31),
            ("dataset_digest", "sha256:" + "0a" * 32 + "\n"),
            ("default_alpha", 0.0),
            ("default_alpha", -6.0),
            ("default_alpha", float("inf")),
            ("default_alpha", None),
            ("created", "yesterday"),
            ("created", "2026-01-31T12:00:00"),
            ("created", "2026-01-31T12:00:00+02:00"),
            ("tools", {"torch": 2}),
            ("tools", {1: "2"}),
            ("tools", ["torch"]),
        ],
    )
    def test_value_of_the_wrong_kind_is_refused_by_name(self, name, value):
        with pytest.raises(LockValidationError, match=rf"not valid: {name}"):
            LockMetadata.parse(metadata_values(**{name: value}))

    def test_all_faults_are_named_at_once(self):
        with pytest.raises(LockValidationError, match=r"seed.*; .*default_alpha"):
            LockMetadata.parse(metadata_values(seed=-1, default_alpha=0.0))

    def test_metadata_cannot_be_changed(self):
        tools = {"torch": "2.13.0"}
        data = metadata(tools=tools)
        tools["torch"] = "9"
        assert data.tools == {"torch": "2.13.0"}
        with pytest.raises(ValidationError, match="frozen"):
            data.seed = 1
        with pytest.raises(TypeError):
            data.tools["torch"] = "9"

    def test_metadata_is_a_value(self):
        assert metadata() == metadata()
        assert hash(metadata()) == hash(metadata())
        assert metadata(seed=1) != metadata()

    def test_canonical_form_is_rfc_8785_with_the_format_version(self):
        text = canonical_metadata(metadata())
        plain = metadata_values(geometry={"layers": 3, "heads": 4, "head_dim": 5, "hidden": 20})
        assert text == rfc8785.dumps({**plain, "format_version": 1})
        assert text.startswith(b'{"architecture":"llama","base_model":"example/base-7b",')


class TestSafetyLock:
    def test_heads_are_sorted_by_layer_then_head(self):
        lock = SafetyLock(tuple(reversed(heads())), metadata())
        assert [(h.layer, h.head) for h in lock.heads] == [(0, 3), (1, 0), (1, 2), (2, 1)]

    def test_lock_without_heads_is_refused(self):
        with pytest.raises(LockValidationError, match="at least one head"):
            SafetyLock((), metadata())

    def test_head_twice_is_refused(self):
        with pytest.raises(LockValidationError, match="Head 2 of layer 1 is in the lock twice"):
            SafetyLock((*heads(), LockedHead(1, 2, unit(1, 0, 0, 0, 0), 1.0)), metadata())

    @pytest.mark.parametrize(("layer", "head"), [(3, 0), (0, 4), (2**31, 0)])
    def test_head_outside_the_geometry_is_refused(self, layer, head):
        with pytest.raises(
            LockValidationError, match=f"Head {head} of layer {layer} lies outside .*3 layers"
        ):
            SafetyLock((LockedHead(layer, head, unit(1, 0, 0, 0, 0), 1.0),), metadata())

    @pytest.mark.parametrize("length", [1, 4, 6])
    def test_direction_of_another_length_than_head_dim_is_refused(self, length):
        with pytest.raises(LockValidationError, match=f"has {length} numbers, and head_dim is 5"):
            SafetyLock((LockedHead(0, 0, unit(*[1.0] * length), 1.0),), metadata())

    @pytest.mark.parametrize(
        "table",
        [scores().T, scores().astype(np.float64), scores()[:2], scores().ravel(), scores().tolist()],
        ids=["transposed", "float64", "too few layers", "flat", "list"],
    )
    def test_scores_of_another_shape_or_dtype_are_refused(self, table):
        with pytest.raises(LockValidationError, match=r"must be float32 of shape \[3, 4\]"):
            SafetyLock(heads(), metadata(), table)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -0.01, 1.01])
    def test_score_that_is_no_accuracy_is_refused(self, value):
        table = scores()
        table[1, 1] = value
        with pytest.raises(LockValidationError, match="between 0 and 1"):
            SafetyLock(heads(), metadata(), table)

    @pytest.mark.parametrize(
        "table",
        [
            unit_biases().T,
            unit_biases()[:3],
            unit_biases().astype(np.float64),
            unit_biases().ravel(),
            unit_biases().tolist(),
        ],
        ids=["transposed", "too few heads", "float64", "flat", "list"],
    )
    def test_unit_biases_of_another_shape_or_dtype_are_refused(self, table):
        with pytest.raises(LockValidationError, match=r"must be float32 of shape \[4, 20\]"):
            SafetyLock(heads(), metadata(), unit_biases=table)

    def test_unit_biases_follow_their_heads(self):
        backwards = SafetyLock(
            tuple(reversed(heads())), metadata(), scores(), unit_biases()[::-1].copy(), sketch()
        )
        assert backwards == make_full_lock()
        assert backwards.unit_biases.tobytes() == unit_biases().tobytes()
        with pytest.raises(ValueError, match="WRITEABLE"):
            backwards.unit_biases.flags.writeable = True

    def test_a_full_lock_survives_copies(self):
        for twin in (pickle.loads(pickle.dumps(make_full_lock())), copy.deepcopy(make_full_lock())):
            assert twin == make_full_lock()
            assert twin.unit_biases.tobytes() == unit_biases().tobytes()
            assert twin.sketch.values.tobytes() == sketch().values.tobytes()

    def test_lock_cannot_be_changed(self):
        table = scores()
        lock = SafetyLock(heads(), metadata(), table)
        table[0, 0] = 1.0
        assert lock.scores.tobytes() == scores().tobytes()
        with pytest.raises(FrozenInstanceError):
            lock.heads = ()
        with pytest.raises(ValueError, match="read-only"):
            lock.scores[0, 0] = 1.0
        with pytest.raises(ValueError, match="WRITEABLE"):
            lock.scores.flags.writeable = True

    def test_numbers_it_hands_out_are_copies(self):
        lock = make_lock()
        before = lock.digest
        for values in lock.tensors().values():
            if values.flags.writeable:
                values[...] = 0
        assert SafetyLock(lock.heads, lock.metadata, lock.scores).digest == before

    def test_layers_and_their_heads(self):
        lock = make_lock()
        assert lock.layers == (0, 1, 2)
        assert [h.head for h in lock.heads_of_layer(1)] == [0, 2]
        assert lock.heads_of_layer(7) == ()
        assert lock.geometry == GEOMETRY
        assert lock.base_model == "example/base-7b"

    def test_ranking_is_by_score_then_lower_layer_then_lower_head(self):
        table = np.full((3, 4), 0.5, dtype=np.float32)
        table[2, 1] = 0.9
        ranked = SafetyLock(heads(), metadata(), table).ranked_heads()
        assert [(h.layer, h.head) for h in ranked] == [(2, 1), (0, 3), (1, 0), (1, 2)]

    def test_lock_without_scores_has_no_ranking(self):
        with pytest.raises(LockValidationError, match="no probe scores"):
            SafetyLock(heads(), metadata()).ranked_heads()

    def test_tensors_have_the_stored_dtypes_and_shapes(self):
        stored = {name: (v.dtype.str, v.shape) for name, v in make_lock().tensors().items()}
        assert stored == {
            "layers": ("<i4", (4,)),
            "heads": ("<i4", (4,)),
            "directions": ("<f4", (4, 5)),
            "stds": ("<f8", (4,)),
            "scores": ("<f4", (3, 4)),
        }
        assert "scores" not in SafetyLock(heads(), metadata()).tensors()

    def test_equal_locks_are_equal_and_hash_alike(self):
        one, other = make_lock(), SafetyLock(tuple(reversed(heads())), metadata(), scores())
        assert one == other
        assert hash(one) == hash(other)
        assert len({one, other}) == 1
        assert one != make_lock(seed=1)
        assert one != "a lock"

    @settings(deadline=None)
    @given(any_lock())
    def test_copies_and_pickled_locks_are_equal_and_as_frozen(self, lock):
        for twin in (copy.copy(lock), copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
            assert twin == lock
            assert twin.metadata == lock.metadata
            assert not twin.heads[0].direction.flags.writeable

    def test_repr_says_what_matters_on_one_line(self):
        lock = make_lock()
        assert repr(lock) == (
            f"SafetyLock('example/base-7b', 4 of 12 heads, layers 0-2, forged, {lock.digest[:19]})"
        )


def nudged(direction: np.ndarray) -> np.ndarray:
    """The next float32 in one place: still of norm one, and another direction."""
    values = direction.copy()
    values[-1] = np.nextafter(values[-1], np.float32(2))
    return values


def changed_head(**changes: object) -> SafetyLock:
    first, *others = heads()
    values = {"layer": first.layer, "head": first.head, "direction": first.direction, "std": first.std}
    return SafetyLock((LockedHead(**(values | changes)), *others), metadata(), scores())


def changed_scores() -> np.ndarray:
    table = scores()
    table[2, 3] = np.nextafter(table[2, 3], np.float32(1))
    return table


CHANGED_METADATA = {
    "base_model": "example/base-8b",
    "base_revision": None,
    "architecture": "mistral",
    "geometry": AttentionGeometry(layers=3, heads=4, head_dim=5, hidden=21),
    "origin": "published",
    "last_tokens": 4,
    "pairs": 99,
    "split": "row",
    "train_fraction": 0.5,
    "seed": 1,
    "system_prompt": "",
    "dataset_digest": "sha256:" + "0b" * 32,
    "default_alpha": 6.5,
    "created": "2026-01-31T12:00:01+00:00",
    "tools": {"mlflow-safelock": "0.1.1", "torch": "2.13.0"},
}


class TestDigest:
    def test_digest_has_its_form(self):
        assert make_lock().digest.startswith("sha256:")
        assert len(make_lock().digest) == len("sha256:") + 64

    def test_digest_does_not_depend_on_the_run(self):
        assert make_lock().digest == (
            "sha256:24225c66400928983e60872953921f63591e948a685bc15386fc10e563deca89"
        )

    def test_every_metadata_field_is_tried(self):
        assert CHANGED_METADATA.keys() == metadata_values().keys()

    @pytest.mark.parametrize("name", CHANGED_METADATA)
    def test_every_metadata_field_counts(self, name):
        assert make_lock(**{name: CHANGED_METADATA[name]}).digest != make_lock().digest

    def test_unknown_differs_from_every_value(self):
        assert make_lock(seed=None).digest != make_lock(seed=0).digest

    @pytest.mark.parametrize(
        "lock",
        [
            changed_head(layer=1, head=3),
            changed_head(head=2),
            changed_head(direction=nudged(heads()[0].direction)),
            changed_head(std=float(np.nextafter(0.25, 1.0))),
            SafetyLock(heads()[:-1], metadata(), scores()),
            SafetyLock(heads(), metadata(), changed_scores()),
            SafetyLock(heads(), metadata()),
        ],
        ids=["layer", "head", "direction", "std", "fewer heads", "a score", "no scores"],
    )
    def test_every_number_counts_to_its_last_bit(self, lock):
        assert lock.digest != make_lock().digest

    @pytest.mark.parametrize(
        "changes",
        [
            {"unit_biases": np.nextafter(unit_biases(), np.float32(2))},
            {"unit_biases": None},
            {"sketch": None},
            {"sketch": sketch(layers=np.array([0, 1], dtype=np.int32))},
            {"sketch": sketch(offsets=sketch().offsets - np.eye(2, 3, 1, dtype=np.int64))},
            {"sketch": sketch(values=np.nextafter(sketch().values, np.float16(9)))},
        ],
        ids=["a unit bias", "no unit biases", "no sketch", "a layer", "offsets", "a value"],
    )
    def test_what_is_kept_of_the_base_counts_to_its_last_bit(self, changes):
        parts = {"unit_biases": unit_biases(), "sketch": sketch()} | changes
        assert SafetyLock(heads(), metadata(), scores(), **parts).digest != make_full_lock().digest
