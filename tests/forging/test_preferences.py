from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlflow_safelock.errors import PreferenceDataError
from mlflow_safelock.forging import PairKeys, PreferencePair, dataset_digest, load_pairs

PAIRS = (
    PreferencePair("How?", "No, but ask a lawyer.", "Sure, first"),
    PreferencePair("Wo, “dort”?", "Nein,\nlieber nicht.", 'Ja, "gern"'),
    PreferencePair("Why?", "I would rather not.", "Because, \u2028 well"),
)
GOOD = '{"question": "a?", "safe": "no no", "unsafe": "yes"}'


def as_objects(pairs: tuple[PreferencePair, ...]) -> list[dict[str, str]]:
    return [{"question": pair.question, "safe": pair.safe, "unsafe": pair.unsafe} for pair in pairs]


def written(pairs: tuple[PreferencePair, ...], suffix: str) -> str:
    objects = as_objects(pairs)
    if suffix == ".json":
        return json.dumps(objects, indent=2, ensure_ascii=False)
    if suffix == ".jsonl":
        return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, ["question", "safe", "unsafe"])
    writer.writeheader()
    writer.writerows(objects)
    return text.getvalue()


def saved(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".JSONL"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_kind_of_file_gives_the_pairs_back(tmp_path: Path, suffix: str, mark: str) -> None:
    path = saved(tmp_path, f"pairs{suffix}", mark + written(PAIRS, suffix.lower()))
    assert load_pairs(path) == PAIRS
    assert load_pairs(str(path)) == PAIRS


def test_other_keys_are_read_where_they_are_named(tmp_path: Path) -> None:
    text = '[{"q": "a?", "good": "no", "bad": "yes", "note": [1, {"x": null}]}]'
    path = saved(tmp_path, "pairs.json", text)
    assert load_pairs(path, PairKeys("q", "good", "bad")) == (PreferencePair("a?", "no", "yes"),)


@pytest.mark.shared
def test_the_published_dataset_loads(shared: Path) -> None:
    keys = PairKeys("question", "answer_matching_behavior", "answer_not_matching_behavior")
    pairs = load_pairs(shared / "data" / "safe_dataset.json", keys)
    raw = json.loads((shared / "data" / "safe_dataset.json").read_text())
    assert len(pairs) == len(raw)
    assert pairs[7].unsafe == raw[7]["answer_not_matching_behavior"]
    assert pairs[-1].safe == raw[-1]["answer_matching_behavior"]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.csv"])
def test_missing_keys_are_named_with_the_keys_that_are_there_and_the_way_to_say_so(
    tmp_path: Path, name: str
) -> None:
    text = {
        "pairs.json": '[\n{"question": "a", "chosen": "b", "rejected": "c"}]',
        "pairs.jsonl": '\n{"question": "a", "chosen": "b", "rejected": "c"}',
        "pairs.csv": "question,chosen,rejected\na,b,c\n",
    }[name]
    with pytest.raises(PreferenceDataError) as caught:
        load_pairs(saved(tmp_path, name, text))
    message = str(caught.value)
    assert (
        f"{name}, line 2: no 'safe', 'unsafe' here; the keys are 'question', 'chosen', 'rejected'" in message
    )
    assert "PairKeys(question=..., safe=..., unsafe=...)" in message
    assert "--safe-key" in message


BAD_OBJECTS = [
    ('{"question": "a?", "safe": "no no"}', "no 'unsafe' here"),
    ('{"question": "a?", "safe": 7, "unsafe": "yes"}', "the safe answer must be text, not int"),
    ('{"question": null, "safe": "no", "unsafe": "yes"}', "the question must be text, not NoneType"),
    ('{"question": "a?", "safe": ["no"], "unsafe": "yes"}', "the safe answer must be text, not list"),
    ('{"question": " \\t", "safe": "no", "unsafe": "yes"}', "the question is empty"),
    ('{"question": "a?", "safe": "no", "unsafe": ""}', "the unsafe answer is empty"),
    ('{"question": "a?", "safe": "same ", "unsafe": " same"}', "the safe and the unsafe answer are the same"),
    ('{"question": "a?", "safe": "n\\u0000o", "unsafe": "yes"}', "the safe answer holds a NUL character"),
    ('{"question": "a?", "safe": "\\ud800", "unsafe": "yes"}', "holds half of a character"),
    ('{"question": "a?", "question": "b?", "safe": "no", "unsafe": "yes"}', "the key 'question' stands"),
    ('{"question": "a?", "safe": "no", "unsafe": "yes", "x": {"y": 1, "y": 2}}', "the key 'y' stands"),
    ('{"question": "a?", "safe": "no", "unsafe": "yes", "x": NaN}', "NaN is no JSON value"),
    ('{"question": "a?", "safe": "no", "unsafe": "yes", "x": ' + "9" * 5000 + "}", "not JSON to rely on"),
    ("[" * 100_000, "nested too deeply"),
    ('["a?", "no", "yes"]', "not an object"),
    ('"a?"', "not an object"),
    ('{"question": "a?", safe: "no"}', "not JSON: Expecting property name"),
    ('{"question": "a\x00?", "safe": "no", "unsafe": "yes"}', "not JSON: Invalid control character"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_OBJECTS, ids=[message for _, message in BAD_OBJECTS])
def test_a_bad_row_is_an_error_with_file_and_line(tmp_path: Path, bad: str, message: str) -> None:
    lines = saved(tmp_path, "a.jsonl", f"{GOOD}\n\n{GOOD}\r\n{bad}\n{GOOD}\n")
    with pytest.raises(PreferenceDataError, match=r"a\.jsonl, line 4: .*" + message):
        load_pairs(lines)
    listed = saved(tmp_path, "a.json", f"\n[\n{GOOD},\n\n  {GOOD}  ,\n{bad}\n,{GOOD}\n]")
    with pytest.raises(PreferenceDataError, match=r"a\.json, line 6: .*" + message):
        load_pairs(listed)


def test_a_fault_inside_an_object_of_many_lines_is_told_with_its_own_line(tmp_path: Path) -> None:
    text = '[\n{"question": "a?",\n "safe": "no",\n "unsafe" "yes"}\n]'
    with pytest.raises(PreferenceDataError, match=r"a\.json, line 4: not JSON"):
        load_pairs(saved(tmp_path, "a.json", text))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (GOOD, 1, "one list of objects"),
        ("\n\n7", 3, "one list of objects"),
        ("", 1, "one list of objects"),
        (f"[{GOOD}\n{GOOD}]", 2, "a comma or ] is missing"),
        (f"[\n{GOOD}\n", 3, "a comma or ] is missing"),
        (f"[\n{GOOD},\n]", 3, "not JSON"),
        (f"[\n,{GOOD}]", 2, "not JSON"),
        (f"[{GOOD}\n]\n\n{GOOD}", 4, "text after the list"),
        ("[]\n]", 2, "text after the list"),
    ],
)
def test_a_list_that_is_no_list_is_an_error_with_its_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(PreferenceDataError, match=rf"a\.json, line {line}: .*{message}"):
        load_pairs(saved(tmp_path, "a.json", text))


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            'question,safe,unsafe\na?,"no\nno",yes\nb?,"no"\n',
            4,
            "the row has 2 values, and the header names 3",
        ),
        ("question,safe,unsafe\na?,no,yes,maybe\n", 2, "the row has 4 values"),
        ("question,safe,safe,unsafe\na?,no,no,yes\n", 1, "names a column twice"),
        ('question,safe,unsafe\n\na?,"no" no,yes\n', 3, "not CSV"),
        ('question,safe,unsafe\r\na?,no,"yes', 2, "not CSV"),
        ("question,safe,unsafe\na?,no,yes\nb?,,yes\n", 3, "the safe answer is empty"),
        ("question,safe,unsafe\na?,no,yes\n\nb?,n\0o,yes\n", 4, "NUL"),
        ("question,safe,unsafe\na?," + "x" * 200_000 + ",yes\n", 2, "field larger than field limit"),
    ],
)
def test_a_bad_csv_row_is_an_error_with_the_line_it_starts_on(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    with pytest.raises(PreferenceDataError, match=rf"a\.csv, line {line}: .*{message}"):
        load_pairs(saved(tmp_path, "a.csv", text))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_text_that_is_not_utf8_is_an_error_with_its_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(PreferenceDataError, match=rf"{name}, line 3: the text is not UTF-8"):
        load_pairs(saved(tmp_path, name, b"first\nsecond\nth\xefrd\n"))


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[ ]"), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "a,b\n")]
)
def test_a_file_without_pairs_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(PreferenceDataError, match="holds no preference pairs"):
        load_pairs(saved(tmp_path, name, text))


def test_a_file_that_cannot_be_read_or_is_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PreferenceDataError, match=r"none\.jsonl cannot be read: No such file"):
        load_pairs(tmp_path / "none.jsonl")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(PreferenceDataError, match=r"folder\.json cannot be read"):
        load_pairs(tmp_path / "folder.json")
    with pytest.raises(PreferenceDataError, match=r"\.json, \.jsonl, \.csv"):
        load_pairs(saved(tmp_path, "pairs.yaml", "[]"))


@pytest.mark.parametrize("keys", [("a", "a", "b"), ("a", "b", ""), ("a", "b", 3)])
def test_keys_must_be_three_names(keys: tuple[str, str, str]) -> None:
    with pytest.raises(PreferenceDataError, match="three different names"):
        PairKeys(*keys)


def test_a_pair_is_frozen_and_checked_when_it_is_made() -> None:
    with pytest.raises(PreferenceDataError, match="the unsafe answer is empty"):
        PreferencePair("a?", "no", "  ")
    with pytest.raises(AttributeError):
        PAIRS[0].safe = "yes"  # type: ignore[misc]


def test_the_digest_is_that_of_the_canonical_json() -> None:
    pairs = (PreferencePair("é?", "no", "yes"),)
    text = '[{"question":"é?","safe":"no","unsafe":"yes"}]'
    assert dataset_digest(pairs) == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_the_digest_knows_the_pairs_and_their_order_and_not_the_file(tmp_path: Path) -> None:
    digests = {
        dataset_digest(load_pairs(saved(tmp_path, f"a{suffix}", written(PAIRS, suffix))))
        for suffix in (".json", ".jsonl", ".csv")
    }
    assert len(digests) == 1
    assert dataset_digest(PAIRS[::-1]) not in digests
    assert dataset_digest(PAIRS[:2]) not in digests


# What every kind of file can hold: CSV files have one way to end a line within a value.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1).filter(
    str.strip
)


@given(
    st.lists(
        st.tuples(TEXT, TEXT, TEXT).filter(lambda t: t[1].strip() != t[2].strip()), min_size=1, max_size=4
    )
)
def test_any_pairs_survive_every_kind_of_file(tmp_path_factory: pytest.TempPathFactory, texts: list) -> None:
    folder = tmp_path_factory.mktemp("pairs")
    pairs = tuple(PreferencePair(*three) for three in texts)
    for suffix in (".json", ".jsonl", ".csv"):
        assert load_pairs(saved(folder, f"pairs{suffix}", written(pairs, suffix))) == pairs
