"""A fine-tune's tokenizer, with tokens of its own, has the base's vocabulary; another one has not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from mlflow_safelock.errors import SourceError
from mlflow_safelock.forging.base_tokenizer import digest_of_tokenizer, tokenizer_in
from mlflow_safelock.vocabulary import MAX_RANGES, Vocabulary, VocabularyDigest
from tests.forging.tokenizers import KINDS, tokenizer
from tests.models import CHATML, tiny_tokenizer


def parsed(tokenizer: Any) -> Vocabulary:
    found = Vocabulary.parse(tokenizer.backend_tokenizer.to_str(), origin="It")
    assert found is not None
    return found


def known(tokenizer: Any) -> VocabularyDigest:
    found = digest_of_tokenizer(tokenizer)
    assert found is not None
    return found


def saved(tokenizer: Any, folder: Path) -> dict[str, Any]:
    tokenizer.save_pretrained(folder)
    values: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return values


def vocabulary_of(values: dict[str, Any]) -> Vocabulary:
    found = Vocabulary.parse(json.dumps(values), origin="It")
    assert found is not None
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_fine_tune_that_adds_tokens_and_is_saved_again_still_has_the_bases(
    kind: str, tmp_path: Path
) -> None:
    base = known(tokenizer(kind, None))
    assert sum(end - first for first, end in base.ids) > 20
    tokenizer(kind, None).save_pretrained(tmp_path / "base")
    assert tokenizer_in(tmp_path / "base") == base, "of the file and of what is loaded the same"
    fine_tune = AutoTokenizer.from_pretrained(tmp_path / "base")
    fine_tune.add_special_tokens({"pad_token": "<|new_pad|>"})
    fine_tune.add_tokens(["<|im_start|>", AddedToken("<|im_end|>", special=True), "photosynthesis"])
    fine_tune.chat_template = CHATML
    fine_tune.save_pretrained(tmp_path / "fine-tune")
    again = AutoTokenizer.from_pretrained(tmp_path / "fine-tune")
    again.save_pretrained(tmp_path / "again")
    assert parsed(again).extends(base)
    file = (tmp_path / "again" / "tokenizer.json").read_bytes()
    assert file != (tmp_path / "base" / "tokenizer.json").read_bytes()
    found = Vocabulary.parse(file, origin="It")
    assert found is not None
    assert found.extends(base)
    assert not parsed(tokenizer(kind, None)).extends(known(again)) or known(again) == base


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer"])
def test_the_class_that_a_tokenizer_is_loaded_and_saved_by_does_not_matter(name: str, tmp_path: Path) -> None:
    base = tiny_tokenizer(CHATML)
    base.save_pretrained(tmp_path / "base")
    other = getattr(transformers, name).from_pretrained(tmp_path / "base")
    assert vocabulary_of(saved(other, tmp_path / "again")).extends(known(base))


def test_tokens_of_its_own_in_place_of_the_bases_added_ones_are_no_difference(tmp_path: Path) -> None:
    base = tiny_tokenizer(CHATML)
    values = saved(base, tmp_path)
    for token in values["added_tokens"]:
        values["model"]["vocab"][f"<|own_{token['id']}|>"] = values["model"]["vocab"].pop(token["content"])
        token["content"] = f"<|own_{token['id']}|>"
    assert vocabulary_of(values).extends(known(base))


def swap_two(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    one, other = list(vocabulary)[100:102]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def rename_one(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary["zyzzyva"] = vocabulary.pop(list(vocabulary)[-1])


def drop_the_last(values: dict[str, Any]) -> None:
    values["model"]["vocab"].popitem()


def swap_two_merges(values: dict[str, Any]) -> None:
    merges = values["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def drop_a_merge(values: dict[str, Any]) -> None:
    values["model"]["merges"].pop()


def put_a_merge_before(values: dict[str, Any]) -> None:
    values["model"]["merges"].insert(0, ["q", "u"])


@pytest.mark.parametrize(
    "change", [swap_two, rename_one, drop_the_last, swap_two_merges, drop_a_merge, put_a_merge_before]
)
def test_another_vocabulary_is_told(change: Any, tmp_path: Path) -> None:
    base = tiny_tokenizer(CHATML)
    values = saved(base, tmp_path)
    assert vocabulary_of(values).extends(known(base))
    change(values)
    assert not vocabulary_of(values).extends(known(base))


def test_more_merges_after_the_bases_and_their_older_form_are_no_difference(tmp_path: Path) -> None:
    base = tiny_tokenizer(CHATML)
    values = saved(base, tmp_path)
    merges = values["model"]["merges"]
    values["model"]["merges"] = [" ".join(merge) for merge in merges]
    assert vocabulary_of(values).extends(known(base))
    values["model"]["merges"] = [*merges, ["q", "u"]]
    assert vocabulary_of(values).extends(known(base))


def test_no_two_lists_of_tokens_are_digested_alike() -> None:
    one = Vocabulary({0: "ab", 1: "c"}, {}, ())
    for other in (
        Vocabulary({0: "a", 1: "bc"}, {}, ()),
        Vocabulary({0: "ab", 1: "c", 2: ""}, {}, ()),
        Vocabulary({0: "ab"}, {}, [("c", "")]),
    ):
        assert one.digest() != other.digest()


def test_of_a_vocabulary_in_many_stretches_the_longest_are_compared() -> None:
    tokens = {number: f"t{number}" for number in range(1000) if number < 500 or number % 3}
    digest = Vocabulary(tokens, {}, ()).digest()
    assert digest is not None
    assert len(digest.ids) == MAX_RANGES
    assert digest.ids[0] == (0, 501)
    assert Vocabulary(tokens, {}, ()).extends(digest)
    assert not Vocabulary({**tokens, 7: "other"}, {}, ()).extends(digest)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b'{"model": 1}',
        b'{"model": {"vocab": {"a": "1"}}}',
        b'{"model": {"vocab": {"a": -1}}}',
        b'{"model": {"vocab": [["a"], [1]]}}',
        b'{"model": {"vocab": {"a": 0}, "merges": ["a b c"]}}',
        b'{"model": {"vocab": {"a": 0}, "merges": [["a", 1]]}}',
        b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_tokenizer_is_an_error(text: bytes) -> None:
    with pytest.raises(SourceError, match="It is no tokenizer"):
        Vocabulary.parse(text, origin="It")


def test_a_tokenizer_without_a_vocabulary_is_not_known(tmp_path: Path) -> None:
    assert Vocabulary.parse(b'{"model": {"type": "Other"}}', origin="It") is None
    assert Vocabulary({}, {}, ()).digest() is None
    assert tokenizer_in(tmp_path) is None
    assert digest_of_tokenizer(object()) is None  # type: ignore[arg-type]
    empty = Tokenizer(models.WordLevel({}, unk_token="x"))
    found = Vocabulary.parse(empty.to_str(), origin="It")
    assert found is not None
    assert found.digest() is None


@pytest.mark.parametrize(
    "ids", [[], [[3, 3]], [[3, 1]], [[0, 4], [4, 6]], [[5, 6], [0, 2]], [[-1, 3]], [[0, 1, 2]]]
)
def test_stretches_that_are_none_are_refused(ids: list[list[int]]) -> None:
    with pytest.raises(ValidationError):
        VocabularyDigest.model_validate({"ids": ids, "merges": 0, "digest": f"sha256:{'0' * 64}"})
