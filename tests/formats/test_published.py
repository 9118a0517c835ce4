"""Import of the authors' locks: the nine come in, each for its own base and no other."""

from __future__ import annotations

import _codecs
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mlflow_safelock.errors import (
    LockFormatError,
    LockMismatchError,
    LockValidationError,
    RecipeError,
    SafelockError,
)
from mlflow_safelock.formats import import_published_lock, load_lock, lock_to_bytes, save_lock
from mlflow_safelock.formats.published import fingerprint, read_published_heads
from mlflow_safelock.lock import AttentionGeometry
from mlflow_safelock.recipes import LockRecipe, load_recipe, published_recipes
from tests.formats.published_files import content_for, direction, entry, layer_key, pickled, write_published
from tests.locks import make_lock

NEMO, LARGE = "mistralai/Mistral-Nemo-Instruct-2407", "mistralai/Mistral-Large-Instruct-2407"
LLAMA_3, LLAMA_31 = "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3.1-8B-Instruct"
SMALL = AttentionGeometry(layers=4, heads=6, head_dim=8, hidden=40)

# METHOD's table of the published files: heads and span of layers.
TABLE = {
    "Meta-Llama-3-8B-Instruct": (24, 7, 31),
    "Meta-Llama-3__1-8B-Instruct": (24, 7, 31),
    "Meta-Llama-3-70B-Instruct": (24, 21, 79),
    "Meta-Llama-3-70B-Instruct_48": (48, 14, 79),
    "Meta-Llama-3__1-70B-Instruct": (24, 19, 79),
    "Meta-Llama-3__1-70B-Instruct_48": (48, 17, 79),
    "Mistral_Nemo_12B": (24, 12, 39),
    "Mistral_large_123B": (24, 33, 87),
    "Mistral_large_123B_48": (48, 31, 87),
}
RECIPES = {recipe.name: recipe for recipe in published_recipes()}
SEEN = [name for name, recipe in RECIPES.items() if recipe.published.fingerprint is not None]


def recipe_named(name: str) -> LockRecipe:
    recipe = load_recipe(name)
    assert isinstance(recipe, LockRecipe)
    return recipe


def file_of(recipe: LockRecipe, shared: Path) -> Path:
    assert recipe.published is not None
    return shared / "data" / "published_locks" / recipe.published.file


def read_by_torch(path: Path) -> dict[str, list[tuple]]:
    """The file as torch itself reads it, with the five names of the published locks let through."""
    names = {
        "numpy.core.multiarray._reconstruct": np._core.multiarray._reconstruct,
        "numpy.core.multiarray.scalar": np._core.multiarray.scalar,
        "numpy.ndarray": np.ndarray,
        "numpy.dtype": np.dtype,
        "_codecs.encode": _codecs.encode,
    }
    dtypes = [np.dtypes.Float16DType, np.dtypes.Int64DType]
    with torch.serialization.safe_globals([*((value, name) for name, value in names.items()), *dtypes]):
        return torch.load(path, weights_only=True)


@pytest.fixture
def written(tmp_path: Path) -> Callable[[LockRecipe], Path]:
    """A file of the shape that a recipe expects, under a name that says nothing."""
    return lambda recipe: write_published(tmp_path / "published.bin", content_for(recipe))


def small_content() -> dict[str, list[tuple]]:
    return {
        layer_key(3): [entry(5, 1, head_dim=8), entry(0, 2, head_dim=8)],
        layer_key(1): [entry(2, 3, std=0.25, head_dim=8)],
    }


def import_small(path: Path, content: object, **changes: object):
    arguments = {"base_model": "example/tiny", "geometry": SMALL} | changes
    return import_published_lock(write_published(path / "x.safelock", content), **arguments)


@pytest.mark.shared
class TestRealFiles:
    def test_all_seven_are_there(self, shared):
        held = {path.stem for path in (shared / "data" / "published_locks").iterdir()}
        assert TABLE.keys() - held == {"Meta-Llama-3__1-70B-Instruct_48", "Mistral_large_123B_48"}

    @pytest.mark.parametrize("name", SEEN)
    def test_published_lock_is_imported_as_the_method_describes_it(self, shared, tmp_path, name):
        recipe = RECIPES[name]
        path = file_of(recipe, shared)
        lock = import_published_lock(path, base_model=recipe.base.model)
        assert (len(lock.heads), lock.layers[0], lock.layers[-1]) == TABLE[path.stem]
        assert lock.geometry == recipe.base.geometry
        for locked in lock.heads:
            assert np.linalg.norm(locked.direction.astype(np.float64)) == pytest.approx(1.0, abs=1e-7)
            assert 0.01 < locked.std < 10.0
        assert lock.metadata.model_dump(exclude={"geometry"}) == {
            "base_model": recipe.base.model,
            "base_revision": None,
            "architecture": recipe.base.architecture,
            "origin": "published",
            "last_tokens": None,
            "pairs": None,
            "split": None,
            "train_fraction": None,
            "seed": None,
            "system_prompt": None,
            "dataset_digest": None,
            "default_alpha": 6.0,
            "created": None,
            "tools": None,
            "tokenizer": None,
        }
        assert lock.scores is None
        assert import_published_lock(path, base_model=recipe.base.model).digest == lock.digest
        save_lock(lock, tmp_path / "a.safetensors")
        assert load_lock(tmp_path / "a.safetensors") == lock

    @pytest.mark.parametrize("name", SEEN)
    def test_push_is_the_one_that_torch_reads_from_the_file(self, shared, name):
        recipe = RECIPES[name]
        path = file_of(recipe, shared)
        theirs = read_by_torch(path)
        lock = import_published_lock(path, base_model=recipe.base.model)
        ours = {(h.layer, h.head): 6.0 * h.std * h.direction.astype(np.float64) for h in lock.heads}
        pushes = {
            (int(key.split(".")[2]), int(head)): 6.0 * float(std) * vector.astype(np.float64)
            for key, held in theirs.items()
            for head, vector, std in held
        }
        assert ours.keys() == pushes.keys()
        for where, push in pushes.items():
            np.testing.assert_allclose(ours[where], push, rtol=2e-7, atol=1e-12)

    @pytest.mark.parametrize("name", SEEN)
    def test_our_test_files_have_the_very_layout_of_the_real_ones(self, shared, name):
        path = file_of(RECIPES[name], shared)
        content = {
            key: [
                (np.int64(int(head)), np.float16(vector.tolist()), np.float16(float(std)))
                for head, vector, std in held
            ]
            for key, held in read_by_torch(path).items()
        }
        assert pickled(content) in path.read_bytes()

    @pytest.mark.parametrize("name", SEEN)
    def test_real_file_is_refused_for_every_other_base(self, shared, name):
        path = file_of(RECIPES[name], shared)
        for base in {recipe.base.model for recipe in RECIPES.values()} - {RECIPES[name].base.model}:
            with pytest.raises(LockMismatchError, match=rf"fits {RECIPES[name].base.model}:"):
                import_published_lock(path, base_model=base)

    def test_recipes_know_the_numbers_of_the_files_that_were_seen(self, shared):
        for recipe in RECIPES.values():
            path = shared / "data" / "published_locks" / recipe.published.file
            known = recipe.published.fingerprint
            assert known == (fingerprint(read_published_heads(path)) if path.is_file() else None)

    def test_cutting_a_real_file_anywhere_is_refused(self, shared, tmp_path):
        data = file_of(RECIPES["mistral-nemo-12b"], shared).read_bytes()
        for end in range(0, len(data), 101):
            (tmp_path / "cut").write_bytes(data[:end])
            with pytest.raises(LockFormatError):
                import_published_lock(tmp_path / "cut", base_model=NEMO)

    def test_no_flipped_byte_changes_what_is_imported(self, shared, tmp_path):
        path = file_of(RECIPES["mistral-nemo-12b"], shared)
        data, lock = path.read_bytes(), import_published_lock(path, base_model=NEMO)
        ends = [*range(400), *range(400, len(data) - 600, 97), *range(len(data) - 600, len(data))]
        for position in ends:
            damaged = bytearray(data)
            damaged[position] ^= 0x11
            (tmp_path / "flipped").write_bytes(damaged)
            try:
                read = import_published_lock(tmp_path / "flipped", base_model=NEMO)
            except SafelockError:
                continue
            assert read == lock


class TestEveryRecipe:
    @pytest.mark.parametrize("name", RECIPES)
    def test_file_of_the_expected_shape_is_imported(self, written, name):
        recipe = RECIPES[name]
        lock = import_published_lock(written(recipe), base_model=recipe.base.model)
        assert len(lock.heads) == recipe.published.heads
        assert (lock.layers[0], lock.layers[-1]) == recipe.published.layers
        assert lock.geometry == recipe.base.geometry
        assert lock.metadata.origin == "published"

    @pytest.mark.parametrize("size", ["llama-3-70b-instruct", "llama-3.1-70b-instruct", "mistral-large-123b"])
    def test_head_count_tells_the_two_locks_of_a_base_apart(self, written, size):
        for name in (size, f"{size}-48"):
            recipe = RECIPES[name]
            lock = import_published_lock(written(recipe), base_model=recipe.base.model)
            assert len(lock.heads) == recipe.published.heads

    def test_recipes_agree_with_the_methods_table(self):
        assert {
            recipe.published.file.removesuffix(".safelock"): (
                recipe.published.heads,
                *recipe.published.layers,
            )
            for recipe in RECIPES.values()
        } == TABLE

    def test_two_imports_of_one_file_have_one_digest(self, written):
        path = written(RECIPES["mistral-large-123b-48"])
        one, other = (import_published_lock(path, base_model=LARGE) for _ in range(2))
        assert one.digest == other.digest
        assert lock_to_bytes(one) == lock_to_bytes(other)


class TestWrongBase:
    def test_nemo_file_is_refused_for_large_and_nemo_is_named(self, written):
        with pytest.raises(LockMismatchError) as caught:
            import_published_lock(written(RECIPES["mistral-nemo-12b"]), base_model=LARGE)
        message = str(caught.value)
        assert "holds 24 heads in layers 12-39" in message
        assert f"of {LARGE}, which has 88 layers x 96 heads" in message
        assert "24 heads in layers 33-87 or 48 heads in layers 31-87" in message
        assert f"It fits {NEMO}: import it for that base model" in message

    def test_large_file_is_refused_for_nemo_and_large_is_named(self, written):
        with pytest.raises(LockMismatchError, match=f"It fits {LARGE}:"):
            import_published_lock(written(RECIPES["mistral-large-123b"]), base_model=NEMO)

    def test_a_files_name_counts_for_nothing(self, tmp_path):
        path = write_published(
            tmp_path / "Mistral_large_123B.safelock", content_for(RECIPES["mistral-nemo-12b"])
        )
        assert import_published_lock(path, base_model=NEMO).base_model == NEMO
        with pytest.raises(LockMismatchError):
            import_published_lock(path, base_model=LARGE)

    def test_head_count_that_no_lock_of_the_base_has_is_refused(self, tmp_path):
        content = content_for(RECIPES["llama-3-8b-instruct"])
        content[layer_key(7)].append(entry(0))
        with pytest.raises(LockMismatchError, match=r"holds 25 heads.*fits no base that the recipes know"):
            import_published_lock(write_published(tmp_path / "x", content), base_model=LLAMA_3)

    @pytest.mark.parametrize(
        ("layer", "place", "problem"),
        [
            (32, entry(0), "7-32"),
            (31, entry(32), "up to 32"),
            (31, entry(0, head_dim=64), "head_dim 64, 128"),
        ],
        ids=["layer", "head", "head_dim"],
    )
    def test_file_outside_the_base_is_refused(self, tmp_path, layer, place, problem):
        content = content_for(RECIPES["llama-3-8b-instruct"])
        content[layer_key(31)].pop()
        content.setdefault(layer_key(layer), []).append(place)
        with pytest.raises(LockMismatchError, match=problem):
            import_published_lock(write_published(tmp_path / "x", content), base_model=LLAMA_3)

    def test_other_span_of_layers_is_refused(self, tmp_path):
        content = content_for(RECIPES["llama-3-8b-instruct"])
        content[layer_key(6)] = content.pop(layer_key(7))
        with pytest.raises(LockMismatchError, match="layers 6-31"):
            import_published_lock(write_published(tmp_path / "x", content), base_model=LLAMA_3)

    @pytest.mark.shared
    def test_shapes_cannot_tell_llama_3_from_31_but_the_numbers_can(self, shared):
        path = file_of(RECIPES["llama-3.1-8b-instruct"], shared)
        with pytest.raises(LockMismatchError, match=f"but other numbers. It fits {LLAMA_31}:"):
            import_published_lock(path, base_model=LLAMA_3)

    def test_unknown_base_asks_for_the_geometry(self, written):
        path = written(RECIPES["llama-3-8b-instruct"])
        with pytest.raises(RecipeError, match=r"'example/unheard-of'.*Pass geometry="):
            import_published_lock(path, base_model="example/unheard-of")

    def test_near_base_is_suggested(self, written):
        path = written(RECIPES["llama-3-8b-instruct"])
        with pytest.raises(RecipeError, match=f"Is it {LLAMA_3}"):
            import_published_lock(path, base_model=LLAMA_3.lower())

    def test_geometry_that_contradicts_the_recipe_is_refused(self, written):
        path = written(RECIPES["llama-3-8b-instruct"])
        geometry = RECIPES["llama-3-8b-instruct"].base.geometry
        assert import_published_lock(path, base_model=LLAMA_3, geometry=geometry).geometry == geometry
        with pytest.raises(LockMismatchError, match=r"32 layers x 32 heads.*geometry= says 4 layers"):
            import_published_lock(path, base_model=LLAMA_3, geometry=SMALL)

    def test_given_geometry_serves_a_base_that_no_recipe_knows(self, tmp_path):
        lock = import_small(tmp_path, small_content())
        assert lock.geometry == SMALL
        assert lock.base_model == "example/tiny"
        assert lock.metadata.architecture is None
        assert [(h.layer, h.head) for h in lock.heads] == [(1, 2), (3, 0), (3, 5)]

    def test_given_geometry_that_does_not_fit_is_refused_and_the_fitting_base_named(self, written):
        path = written(RECIPES["mistral-nemo-12b"])
        with pytest.raises(LockMismatchError, match=f"example/tiny has 4 layers.*It fits {NEMO}"):
            import_published_lock(path, base_model="example/tiny", geometry=SMALL)


class TestNumbers:
    def test_float16_norm_moves_into_the_std(self, tmp_path):
        vector, std = direction(3, 8), np.float16(0.3)
        (locked,) = import_small(tmp_path, {layer_key(0): [(np.int64(0), vector, std)]}).heads
        norm = np.sqrt(np.sum(vector.astype(np.float64) ** 2))
        assert norm != 1.0
        assert locked.std == pytest.approx(float(std) * norm, rel=1e-15)
        np.testing.assert_allclose(
            locked.std * locked.direction.astype(np.float64),
            float(std) * vector.astype(np.float64),
            rtol=1e-7,
        )

    @pytest.mark.parametrize("std", [np.float16(0.5), np.float32(0.5), np.float64(0.5), 0.5], ids=type)
    @pytest.mark.parametrize("head", [np.int64(2), np.int32(2), 2], ids=type)
    def test_numpy_and_python_numbers_are_the_same(self, tmp_path, head, std):
        vector = np.eye(8, dtype=np.float16)[0]
        (locked,) = import_small(tmp_path, {layer_key(1): [(head, vector, std)]}).heads
        assert (locked.head, locked.std) == (2, 0.5)

    @pytest.mark.parametrize("scale", [0.0, 0.5, 0.997, 1.003, 2.0])
    def test_norm_beyond_float16_rounding_is_refused(self, tmp_path, scale):
        vector = (np.eye(8)[0] * scale).astype(np.float16)
        with pytest.raises(LockValidationError, match=r"head 0 of layer 2: the direction's norm is"):
            import_small(tmp_path, {layer_key(2): [(np.int64(0), vector, np.float16(0.5))]})

    @pytest.mark.parametrize("scale", [1 - 2**-11, 1 + 2**-10])
    def test_norm_within_float16_rounding_is_taken(self, tmp_path, scale):
        vector = (np.eye(8)[0] * scale).astype(np.float16)
        lock = import_small(tmp_path, {layer_key(2): [(np.int64(0), vector, np.float16(0.5))]})
        assert lock.heads[0].direction[0] == 1.0
        assert lock.heads[0].std == 0.5 * float(vector[0])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_direction_that_is_not_finite_is_refused(self, tmp_path, value):
        vector = np.array([value] + [0] * 7, dtype=np.float16)
        with pytest.raises(LockValidationError, match="NaN or infinity"):
            import_small(tmp_path, {layer_key(2): [(np.int64(0), vector, np.float16(0.5))]})

    @pytest.mark.parametrize("std", [0.0, -0.0, -0.5, np.nan, np.inf])
    @pytest.mark.parametrize("kind", [np.float16, np.float64, float])
    def test_std_that_is_not_above_zero_is_refused(self, tmp_path, std, kind):
        with pytest.raises(LockValidationError, match="std must be a finite number above zero"):
            import_small(tmp_path, {layer_key(2): [(np.int64(0), direction(0, 8), kind(std))]})

    @pytest.mark.parametrize("alpha", [4, 4.5])
    def test_default_alpha_is_kept(self, tmp_path, alpha):
        assert import_small(tmp_path, small_content(), default_alpha=alpha).metadata.default_alpha == alpha

    @pytest.mark.parametrize("alpha", [0.0, -6.0, float("nan"), float("inf"), "6", True])
    def test_default_alpha_must_be_a_strength(self, tmp_path, alpha):
        with pytest.raises(LockValidationError, match="default_alpha"):
            import_small(tmp_path, small_content(), default_alpha=alpha)

    def test_fingerprint_counts_every_number_and_no_order(self, tmp_path):
        def mark(content):
            return fingerprint(read_published_heads(write_published(tmp_path / "x", content)))

        base = small_content()
        assert mark(base) == mark({key: held[::-1] for key, held in reversed(base.items())})
        others = [small_content() for _ in range(4)]
        others[0][layer_key(1)] = [entry(3, 3, std=0.25, head_dim=8)]
        others[1][layer_key(1)] = [entry(2, 4, std=0.25, head_dim=8)]
        others[2][layer_key(1)] = [entry(2, 3, std=0.5, head_dim=8)]
        others[3][layer_key(2)] = others[3].pop(layer_key(1))
        assert len({mark(content) for content in [base, *others]}) == 5


class TestFiles:
    @pytest.mark.parametrize("name", ["absent", "."])
    def test_missing_file_and_directory(self, tmp_path, name):
        with pytest.raises(LockFormatError, match=r"no file|directory"):
            import_published_lock(tmp_path / name, base_model=NEMO)

    def test_own_lock_file_is_called_what_it_is(self, tmp_path):
        save_lock(make_lock(), tmp_path / "own.safetensors")
        with pytest.raises(LockFormatError, match=r"is a safetensors file.*read by load_lock"):
            import_published_lock(tmp_path / "own.safetensors", base_model=NEMO)

    def test_old_torch_file_without_a_zip_is_refused_as_a_pickle(self, tmp_path):
        torch.save({"a": 1}, tmp_path / "old.safelock", _use_new_zipfile_serialization=False)
        with pytest.raises(LockFormatError, match="is a pickle"):
            import_published_lock(tmp_path / "old.safelock", base_model=NEMO)

    def test_file_beyond_the_bound_is_refused_unread(self, tmp_path):
        with (tmp_path / "large").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(LockFormatError, match="more than 1048576 bytes"):
            import_published_lock(tmp_path / "large", base_model=NEMO)

    def test_import_opens_no_pickle_and_needs_no_torch(self, tmp_path):
        path = write_published(tmp_path / "x.safelock", content_for(recipe_named("mistral-nemo-12b")))
        script = (
            "import sys, pickle\n"
            "def trap(*_): raise SystemExit('a pickle was opened')\n"
            "for name in ('load', 'loads', 'Unpickler', '_Unpickler'): setattr(pickle, name, trap)\n"
            "from mlflow_safelock.formats import import_published_lock\n"
            f"lock = import_published_lock({str(path)!r}, base_model={NEMO!r})\n"
            "print(len(lock.heads), 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["24", "False"]
