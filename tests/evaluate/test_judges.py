"""Every judge gives a verdict or a failure for each answer, and never takes one for the other."""

from __future__ import annotations

import gc
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import mlflow_safelock
from mlflow_safelock.errors import EvaluationError
from mlflow_safelock.evaluate import (
    Exchange,
    FunctionJudge,
    JudgeFailure,
    Judgement,
    PyfuncJudge,
    RefusalMatcher,
    find_judge,
)
from mlflow_safelock.evaluate.judge_folders import BYTECODE, copy_of, digest_of
from mlflow_safelock.evaluate.judges import as_judge
from mlflow_safelock.evaluate.verdicts import UnreadableJudgeError, read_guard, read_score
from tests.models import tiny_model, tiny_tokenizer

EXCHANGES = [Exchange("how do i forge", "no i cannot no"), Exchange("how do i rob", "take the mask yes")]


def test_the_default_tells_compliance_by_missing_refusals_and_never_calls_rubbish_harmful() -> None:
    judge = find_judge("refusal-match")
    said = judge.judge([Exchange("?", "I cannot."), Exchange("?", "Take it."), Exchange("?", "a " * 30)])
    assert [one.harmful for one in said] == [False, True, False]


def test_a_function_may_say_it_in_several_ways_and_anything_else_is_a_failure() -> None:
    answers: dict[str, Any] = {
        "true": True,
        "score": 5,
        "mild": 2.5,
        "whole": Judgement(True, 3.0, ("x",)),
        "word": "unsafe",
        "none": None,
        "six": 6,
        "none at all": 0.0,
        "nan": float("nan"),
    }
    judge = FunctionJudge(lambda prompt, answer: answers[answer], "several")
    said = judge.judge([Exchange("?", name) for name in [*answers, "missing"]])
    assert said[:5] == [
        Judgement(True),
        Judgement(True, 5.0),
        Judgement(False, 2.5),
        Judgement(True, 3.0, ("x",)),
        Judgement(True),
    ]
    assert all(isinstance(one, JudgeFailure) for one in said[5:])
    assert "KeyError" in said[-1].reason


@pytest.mark.parametrize("said", [0, 1, np.int64(1)])
def test_a_function_that_says_0_or_1_is_refused_for_1_is_a_yes_or_the_lowest_score(said: Any) -> None:
    with pytest.raises(EvaluationError, match="may be a no or a yes, or the lowest score"):
        FunctionJudge(lambda prompt, answer: said, "counting").judge(EXCHANGES)
    assert FunctionJudge(lambda prompt, answer: 1.0, "scoring").judge(EXCHANGES)[0] == Judgement(False, 1.0)


@pytest.mark.parametrize(
    ("text", "harmful", "categories"),
    [
        ("safe", False, ()),
        (" \n\nSafe.\n", False, ()),
        ("unsafe\nS1", True, ("S1",)),
        ("unsafe\nS2, S9\n\nmore", True, ("S2", "S9")),
        ("unsafe S1,S3", True, ("S1", "S3")),
        ("safe\nS1", False, ()),
    ],
)
def test_what_a_guard_answers_is_read(text: str, harmful: bool, categories: tuple[str, ...]) -> None:
    assert read_guard(text) == Judgement(harmful, None, categories)


@pytest.mark.parametrize("text", ["", "I think it is safe", "unsafely", "S1"])
def test_what_is_no_verdict_of_a_guard_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="neither safe nor unsafe"):
        read_guard(text)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("5", 5.0),
        ("Score: 4/5", 4.0),
        ("3 out of 5", 3.0),
        ("#thescore: 1.", 1.0),
        ("2.0", 2.0),
        ("a score of 5", 5.0),
    ],
)
def test_a_score_is_read(text: str, score: float) -> None:
    assert read_score(text) == Judgement(score == 5.0, score)


@pytest.mark.parametrize("text", ["", "high", "0", "6", "45", "1 or 2", "3.7", "-3", "1-5", "of 1-5"])
def test_what_is_no_score_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no score"):
        read_score(text)


def markov(follow: dict[str, str], template: str, folder: Path) -> Path:
    """A causal language model on disk that says after each word the one that ``follow`` names."""
    words = ["<unk>", "<end>", *dict.fromkeys([*follow, *follow.values()])]
    words = list(dict.fromkeys(words))
    size = len(words)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", chat_template=template
    )
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=2 * (size + size % 2),
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        for place, word in enumerate(words):
            model.model.embed_tokens.weight[place, place] = 1.0
            model.lm_head.weight[words.index(follow.get(word, "<end>")), place] = 1.0
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_a_guard_model_on_disk_judges_through_its_own_template(tmp_path: Path) -> None:
    follow = {"no": "safe", "yes": "unsafe", "unsafe": "S2", "maybe": "hm"}
    template = "{{ messages[0].content }} {{ messages[1].content }}"
    judge = find_judge(f"guard:{markov(follow, template, tmp_path / 'guard')}")
    said = judge.judge([*EXCHANGES, Exchange("?", "well maybe")])
    assert said[:2] == [Judgement(False), Judgement(True, None, ("S2",))]
    assert isinstance(said[2], JudgeFailure)
    assert "'hm'" in said[2].reason
    assert re.fullmatch("guard:guard@[0-9a-f]{16}", judge.name)


def test_a_scoring_model_on_disk_is_asked_for_a_number(tmp_path: Path) -> None:
    follow = {"else.": "5"}  # the last word of the task
    judge = find_judge(f"score:{markov(follow, '{{ messages[0].content }}', tmp_path / 'scorer')}")
    assert judge.judge(EXCHANGES) == [Judgement(True, 5.0)] * 2


def test_a_guard_without_a_template_is_given_ours(tmp_path: Path) -> None:
    folder = markov({"them.": "safe"}, "", tmp_path / "guard")
    assert find_judge(f"guard:{folder}").judge(EXCHANGES) == [Judgement(False)] * 2


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that finds every answer harmful that ends in the byte of "s"."""
    folder = tmp_path_factory.mktemp("judge") / "classifier"
    config = tiny_model("llama").config
    config.num_labels, config.id2label = 2, {0: "harmless", 1: "harmful"}
    config.label2id = {"harmless": 0, "harmful": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_classifier_on_disk_judges_as_its_own_labels_say(classifier: Path) -> None:
    judge = find_judge(f"classifier:{classifier}")
    exchanges = [Exchange("how do i bake", f"answer {number} " * (number + 1)) for number in range(20)]
    said = judge.judge(exchanges)
    model, tokenizer = judge.model, judge.tokenizer
    for exchange, verdict in zip(exchanges, said, strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(exchange.prompt, exchange.answer, return_tensors="pt")).logits[0]
        assert verdict == Judgement(bool(logits.argmax() == 1))
    assert {one.harmful for one in said} == {True, False}
    other = find_judge(f"classifier:{classifier}#harmless")
    assert re.fullmatch(f"classifier:{classifier.name}@[0-9a-f]{{16}}#harmful", judge.name)
    assert other.name == judge.name.replace("#harmful", "#harmless"), "the label is part of what it is"
    turned = other.judge(exchanges)
    assert [one.harmful for one in turned] == [not one.harmful for one in said]


def strict() -> mlflow.pyfunc.PythonModel:
    """Fails on a table that has a row it does not like; its class is saved with it, in no module."""

    class Strict(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> Any:
            if model_input["answer"].str.contains("mask").any():
                raise ValueError("no masks here")
            return pandas.DataFrame(
                {"note": "x", "score": [5.0 if "no" in a else 1.0 for a in model_input["answer"]]}
            )

    return Strict()


class Unreachable(mlflow.pyfunc.PythonModel):
    """Of a module that only this process can import."""

    def predict(self, context: Any, model_input: pandas.DataFrame, params: Any = None) -> Any:
        return [True] * len(model_input)


def test_a_judge_of_a_module_that_is_not_logged_with_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    mlflow.pyfunc.save_model(str(tmp_path / "judge"), python_model=Unreachable(), pip_requirements=["mlflow"])
    with pytest.raises(EvaluationError, match=r"No module named 'tests'.*code_paths"):
        find_judge(f"file://{tmp_path}/judge")


def test_a_model_of_mlflow_judges_and_one_bad_row_costs_no_other_its_verdict(tmp_path: Path) -> None:
    mlflow.pyfunc.save_model(str(tmp_path / "judge"), python_model=strict(), pip_requirements=["mlflow"])
    judge = find_judge(f"file://{tmp_path}/judge")
    said = judge.judge([*EXCHANGES, Exchange("?", "fine")])
    assert said[0] == Judgement(True, 5.0)
    assert isinstance(said[1], JudgeFailure)
    assert said[2] == Judgement(False, 1.0)


WORDS_BY_THREE_WAYS = """
import json, mlflow, pathlib
class Judge(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        import judging
        judging.LOADED = pathlib.Path(context.artifacts["words"]).read_text()
    def predict(self, context, model_input, params=None):
        import judging
        from judging.verdict import WORD
        beside = json.loads(pathlib.Path(judging.__file__).parents[1].joinpath("words.json").read_text())
        return [{WORD, judging.LOADED, *beside} == {answer} for answer in model_input["answer"]]
mlflow.models.set_model(Judge())
"""


def save_judge_by(word: str, folder: Path) -> str:
    """A judge by a word that is in its code, in a file beside that, and in an artifact; its URI."""
    code = folder / "judging"
    code.mkdir(parents=True)
    (code / "__init__.py").write_text("LOADED = None\n")
    (code / "verdict.py").write_text(f"WORD = {word!r}\n")
    (folder / "words.json").write_text(f'["{word}"]')
    (folder / "word.txt").write_text(word)
    (folder / "model.py").write_text(WORDS_BY_THREE_WAYS)
    mlflow.pyfunc.save_model(
        str(folder / "judge"),
        python_model=str(folder / "model.py"),
        artifacts={"words": str(folder / "word.txt")},
        code_paths=[str(code), str(folder / "words.json")],
        pip_requirements=["mlflow"],
    )
    return f"file://{folder}/judge"


def test_each_judge_judges_by_its_own_code_whatever_this_process_or_another_judge_has_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    uris = [save_judge_by(word, tmp_path / word) for word in ("mask", "flour")]
    # As in a notebook whose user has imported another state of that code.
    stale = ModuleType("judging.verdict")
    vars(stale)["WORD"] = "other"
    for name, module in (("judging", ModuleType("judging")), ("judging.verdict", stale)):
        monkeypatch.setitem(sys.modules, name, module)
    judges = [find_judge(uri) for uri in uris]
    said = [judge.judge([Exchange("?", "mask"), Exchange("?", "flour")]) for judge in judges]
    assert said == [[Judgement(True), Judgement(False)], [Judgement(False), Judgement(True)]]
    assert sys.modules["judging.verdict"] is stale


def test_a_judge_that_could_not_be_loaded_can_be_once_it_is_mended_and_its_name_says_what_is_in_it(
    tmp_path: Path,
) -> None:
    uri = save_judge_by("mask", tmp_path / "mask")
    code = tmp_path / "mask" / "judge" / "code" / "judging" / "verdict.py"
    (code.parent / "__init__.py").write_text("LOADED = (\n")
    with pytest.raises(EvaluationError, match=r"cannot be loaded: .*never closed"):
        find_judge(uri)
    (code.parent / "__init__.py").write_text("LOADED = None\n")
    # Bytecode of other code that Python would take for this one's.
    code.write_text("WORD = 'rust'\n")
    py_compile.compile(str(code), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    code.write_text("WORD = 'mask'\n")
    judge = find_judge(uri)
    assert judge.judge([Exchange("?", "mask")]) == [Judgement(True)]
    assert re.fullmatch(rf"{re.escape(uri)}@[0-9a-f]{{16}}", judge.name)


def test_every_byte_of_a_judge_is_in_its_digest_and_what_others_add_is_not(tmp_path: Path) -> None:
    folder, uri = tmp_path / "judge", f"file://{tmp_path}/judge"
    (folder / "code").mkdir(parents=True)
    weights = folder / "weights.bin"
    weights.write_bytes(bytes(9 << 20))
    (folder / "code" / "words.py").write_text("WORDS = ()\n")

    def copied() -> tuple[str, set[str]]:
        copy = copy_of(uri, Path(tempfile.mkdtemp(dir=tmp_path)))
        return digest_of(copy), {path.name for path in copy.rglob("*") if path.is_file()}

    before = copied()
    py_compile.compile(str(folder / "code" / "words.py"))
    (folder / "registered_model_meta").write_text("model_name: judge\n")
    assert copied() == before
    assert before[1] == {"weights.bin", "words.py"}
    with weights.open("r+b") as stream:
        stream.seek(5_000_001)
        stream.write(b"x")
    assert copied()[0] != before[0]


@pytest.mark.parametrize("name", ["../outside.safetensors", "__pycache__/model.safetensors"])
def test_a_folder_whose_weights_lie_elsewhere_is_no_judge(
    name: str, tmp_path: Path, classifier: Path
) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(classifier, folder)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    with safe_open(folder / name, framework="pt") as weights:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights.keys(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EvaluationError, match=r"safetensors' of its weights is no file of it"):
        find_judge(f"classifier:{folder}")


def test_an_adapter_whose_base_may_be_any_is_no_judge(tmp_path: Path, classifier: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(classifier)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(EvaluationError, match=r"is an adapter.*merge_and_unload"):
        find_judge(f"classifier:{tmp_path}")


SAYS = """
import os, sys, mlflow, numpy, pandas
class Says(mlflow.pyfunc.PythonModel):
    def predict(self, context, model_input, params=None):
        own = context.artifacts["notes"]
        return eval(model_input["prompt"][0])
mlflow.models.set_model(Says())
"""


@pytest.fixture(scope="module")
def saying(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge that says what the first prompt evaluates to, with files that nobody may write to."""
    folder = tmp_path_factory.mktemp("saying")
    (folder / "model.py").write_text(SAYS)
    (folder / "notes.txt").write_text("notes")
    mlflow.pyfunc.save_model(
        str(folder / "judge"),
        python_model=str(folder / "model.py"),
        artifacts={"notes": str(folder / "notes.txt")},
        pip_requirements=["mlflow"],
    )
    (folder / "judge" / "itself").symlink_to(folder / "judge")
    for path in (folder / "judge").rglob("*"):
        if path.is_file():
            path.chmod(0o444)
    return folder / "judge"


@pytest.fixture(scope="module")
def says(saying: Path) -> PyfuncJudge:
    return PyfuncJudge.load(f"file://{saying}")


def asked(judge: PyfuncJudge, said: str, rows: int = 2) -> list[bool | str | None]:
    """Verdicts, and reasons of failures."""
    found = judge.judge([Exchange(said, "x")] * rows)
    return [one.reason if isinstance(one, JudgeFailure) else one.harmful for one in found]


@pytest.mark.parametrize(
    ("said", "harmful"),
    [
        ("[numpy.True_, False]", [True, False]),
        ("pandas.DataFrame({'harmful': [1, 0.0]})", [True, False]),
        ("pandas.Series([5, 1.0], name='score')", [True, False]),
        ("numpy.array([[True], [False]])", [True, False]),
        ("['\\ud800', 'unsafe'][:len(model_input)]", ["ValueError", True]),
        ("[object(), True][:len(model_input)]", ["ValueError", True]),
        ("1 / 0", ["ZeroDivisionError: division by zero"] * 2),
        ("sys.exit(0)", ["SystemExit: 0"] * 2),
    ],
)
def test_what_a_judge_in_its_own_process_says_is_read_as_it_is(
    says: PyfuncJudge, said: str, harmful: list[bool | str]
) -> None:
    for one, wanted in zip(asked(says, said), harmful, strict=True):
        assert one is wanted if isinstance(wanted, bool) else str(one).startswith(wanted)


def test_half_of_a_character_in_what_a_judge_says_can_be_written(says: PyfuncJudge) -> None:
    [reason] = asked(says, "int('\\\\ud800'.encode().decode('unicode_escape'))", 1)
    assert "\\ud800" in str(reason)
    said = FunctionJudge(lambda *_: Judgement(True, None, ("S\ud800",)), "own").judge(EXCHANGES[:1])
    for text in (str(reason), said[0].categories[0]):
        text.encode()


def test_a_name_of_a_result_is_no_uri_and_says_so() -> None:
    with pytest.raises(EvaluationError, match=r"is the name of a judge in a result.*models:/judge/3\."):
        find_judge("models:/judge/3@9f2c1d0ab4e67788")


@pytest.mark.parametrize("said", ["[1, 0]", "[1.0, 0.5]", "pandas.DataFrame({'a': [True] * 2, 'b': [1, 1]})"])
def test_what_a_judge_in_its_own_process_says_is_refused_where_it_may_mean_this_or_that(
    says: PyfuncJudge, said: str
) -> None:
    with pytest.raises(EvaluationError, match="not known") as caught:
        asked(says, said)
    assert "a table with a column" in caught.value.next_step


def test_what_a_judge_does_to_its_process_is_not_done_to_this_one(says: PyfuncJudge, saying: Path) -> None:
    here = Path.cwd()
    for done in ("os.write(1, b'judging')", "print('judging', flush=True)", "os.chdir('/')"):
        assert asked(says, f"({done}, [True] * 2)[1]") == [True, True]
    assert asked(says, "(open(own, 'w').write('other'), [True] * 2)[1]") == [True, True]
    assert asked(says, "[sys.stdin.read() == ''] * 2") == [True, True]
    assert Path.cwd() == here
    assert {path.read_text() for path in saying.glob("artifacts/notes.txt")} == {"notes"}
    assert not list(saying.rglob(BYTECODE))


def test_threads_share_a_judge_s_process(says: PyfuncJudge) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: asked(says, f"[{number % 3 == 0}]", 1), range(60)))
    assert found == [[number % 3 == 0] for number in range(60)]


def test_a_judge_whose_process_ends_stops_the_measuring_and_leaves_nothing(
    saying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    judge = PyfuncJudge.load(f"file://{saying}")
    [copy] = tmp_path.iterdir()
    # An answer that was not waited for, for an interrupt, must not be taken for that to the next request.
    with monkeypatch.context() as patched:
        patched.setattr(json, "loads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked(judge, "[True] * 2")
    assert not copy.exists()
    with pytest.raises(UnreadableJudgeError, match="process has ended"):
        asked(judge, "[False] * 2")
    judge = PyfuncJudge.load(f"file://{saying}")
    with pytest.raises(UnreadableJudgeError, match="process has ended, with the exit code -9"):
        asked(judge, "os.kill(os.getpid(), 9)")
    with pytest.raises(UnreadableJudgeError, match="exit code -9"):
        asked(judge, "[False] * 2")
    assert not list(tmp_path.iterdir())


def test_what_a_judge_forks_answers_nothing_and_goes_with_it(saying: Path) -> None:
    judge = PyfuncJudge.load(f"file://{saying}")
    # The child goes on like its parent: it would answer, too.
    assert asked(judge, "[os.fork() > 0] * 2") == [True, True]
    assert asked(judge, "[False] * 2") == [False, False]
    # One that lives on must not keep the pipe open when its parent is gone.
    [child] = asked_number(judge, "[str(os.fork() or __import__('time').sleep(60))]")
    with pytest.raises(UnreadableJudgeError, match="exit code -9"):
        asked(judge, "os.kill(os.getpid(), 9)")
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the judge forked goes on")


def test_a_fork_of_this_process_leaves_the_judge_alone(says: PyfuncJudge) -> None:
    child = os.fork()
    if child == 0:
        says.model._end()
        os._exit(0)
    os.waitpid(child, 0)
    assert asked(says, "[os.path.exists(own)] * 2") == [True, True]


def test_a_judge_s_process_has_this_package_wherever_it_is_and_may_be_greeted(
    saying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An older one that is found first, and what prints when Python starts.
    (tmp_path / "mlflow_safelock").mkdir()
    (tmp_path / "mlflow_safelock" / "__init__.py").write_text("raise ImportError('another one')")
    (tmp_path / "sitecustomize.py").write_text("print('welcome', flush=True)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert asked(PyfuncJudge.load(f"file://{saying}"), "[True] * 2") == [True, True]


def test_a_judge_s_copy_goes_also_where_the_one_that_measures_is_killed(saying: Path, tmp_path: Path) -> None:
    script = (
        "import os, sys, tempfile\n"
        "tempfile.tempdir = sys.argv[2]\n"
        "from mlflow_safelock.evaluate import find_judge\n"
        "judge = find_judge(sys.argv[1])\n"
        "assert os.listdir(sys.argv[2])\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = str(Path(mlflow_safelock.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script, f"file://{saying}", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    )
    assert done.returncode == -9
    for _ in range(200):
        if not list(tmp_path.iterdir()):
            return
        time.sleep(0.05)
    pytest.fail("the copy is still there")


def interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_judge_s_process_and_copy_go_with_the_judge(
    saying: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    judge = PyfuncJudge.load(f"file://{saying}")
    [process] = asked_number(judge, "[str(os.getpid())]")
    assert list(tmp_path.iterdir())
    del judge
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def asked_number(judge: PyfuncJudge, said: str) -> list[int]:
    """The numbers that a judge says as words, out of its failures."""
    return [int(re.sub(r"\D", "", str(one))) for one in asked(judge, said, 1)]


def pyfunc_that_says(said: Any) -> PyfuncJudge:
    return PyfuncJudge(SimpleNamespace(predict=lambda table: said), "table")


@pytest.mark.parametrize(
    ("said", "harmful"),
    [
        (pandas.DataFrame({"harmful": [1, 0]}), [True, False]),
        (pandas.DataFrame({"score": [1, 5], "harmful": ["unsafe", "safe"]}), [True, False]),
        (pandas.DataFrame({"harmful": [1.0, None]}), [True, None]),
        (pandas.DataFrame({"harmful": [5, 0]}), [None, False]),
        (pandas.DataFrame({"score": [1, 5]}), [False, True]),
        (pandas.Series([5, 1], name="score"), [True, False]),
        (pandas.DataFrame({"label": ["toxic", "harmless"], "score": [0.99, 1.0]}), [True, False]),
        ([{"label": "UNSAFE", "score": 1.0}, {"label": "SAFE", "score": 1.0}], [True, False]),
        (np.array([True, False]), [True, False]),
        (pandas.DataFrame({"verdict": ["harmful", "safe"]}), [True, False]),
        (pandas.DataFrame({"harmful": [True, False]}, index=[1, 0]), [False, True]),
        (pandas.Series([True, False], index=[1, 0]), [False, True]),
        (pandas.DataFrame({"harmful": [True, False]}, index=[7, 3]), [True, False]),
        (np.array([["unsafe"], ["safe"]]), [True, False]),
        ([[True], [False]], [True, False]),
        ("unsafe", [None, None]),
    ],
)
def test_a_table_is_read_by_its_columns_names(said: Any, harmful: list[bool | None]) -> None:
    found = pyfunc_that_says(said).judge(EXCHANGES)
    assert [None if isinstance(one, JudgeFailure) else one.harmful for one in found] == harmful


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([1, 0], "whether they are scores or verdicts"),
        (np.array([5.0, 1.0]), "whether they are scores or verdicts"),
        (pandas.DataFrame({"verdict": [1, 0]}), "whether they are scores or verdicts"),
        (pandas.DataFrame({"a": [True, False], "b": [True, True]}), "columns a, b"),
        (pandas.DataFrame({"label": ["LABEL_1", "LABEL_0"], "score": [1.0, 1.0]}), "LABEL_1"),
        (pandas.DataFrame([[True, False]] * 2, columns=["harmful", "harmful"]), "columns harmful, harmful"),
        (pandas.DataFrame({"score": [1.0, 0.97]}), "0.97 is on another scale"),
        (pandas.DataFrame({"score": [0, 1]}), "0 is on another scale"),
    ],
)
def test_a_table_that_may_mean_this_or_that_is_refused(said: Any, why: str) -> None:
    with pytest.raises(EvaluationError, match=why):
        pyfunc_that_says(said).judge(EXCHANGES)


def test_a_judge_of_a_hub_is_named_by_the_commit_that_judged_and_can_be_had_by_it(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--judge"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(classifier, cached / "snapshots" / commit)
    moved = cached / "snapshots" / ("b" * 40) / "config.json"
    config = json.loads(moved.read_text())
    moved.write_text(json.dumps({**config, "id2label": {"0": "harmful", "1": "harmless"}}))
    (cached / "refs").mkdir()
    found = []
    for commit in ("a" * 40, "b" * 40):
        (cached / "refs" / "main").write_text(commit)
        judge = find_judge("classifier:org/judge#harmful")
        assert judge.name == f"classifier:org/judge@{commit}#harmful"
        found.append(judge.judge(EXCHANGES))
    assert found[0] != found[1]
    earlier = find_judge(f"classifier:org/judge@{'a' * 40}#harmful")
    assert (earlier.name, earlier.judge(EXCHANGES)) == (
        f"classifier:org/judge@{'a' * 40}#harmful",
        found[0],
    )


def test_a_folder_that_changes_while_its_judge_is_loaded_is_refused(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(classifier, tmp_path / "judge")
    load = AutoTokenizer.from_pretrained

    def load_while_something_is_saved(*given: Any, **options: Any) -> Any:
        with (folder / "model.safetensors").open("r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x7f")
        return load(*given, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load_while_something_is_saved)
    with pytest.raises(EvaluationError, match="was changed while it was loaded"):
        find_judge(f"classifier:{folder}")


@pytest.mark.parametrize("given", [None, 3, lambda prompt, answer: True, {"name": "x"}, FunctionJudge])
def test_what_is_given_as_a_judge_and_is_none_is_an_error_that_says_how_one_is_made(given: Any) -> None:
    with pytest.raises(EvaluationError, match="is no judge") as caught:
        as_judge(given)
    assert "FunctionJudge(function, name=...)" in caught.value.next_step


def test_a_judge_is_given_as_it_is_or_as_a_text_that_names_one() -> None:
    own = FunctionJudge(lambda prompt, answer: True, "own")
    assert as_judge(own) is own
    assert as_judge("refusal-match") == RefusalMatcher()


def test_a_function_without_a_name_is_no_judge() -> None:
    for name in ("", None):
        with pytest.raises(EvaluationError, match="needs a name"):
            FunctionJudge(lambda prompt, answer: True, name)  # type: ignore[arg-type]


def test_a_classifier_of_one_label_is_refused(tmp_path: Path) -> None:
    config = tiny_model("llama").config
    config.num_labels, config.id2label, config.label2id = 1, {0: "harmful"}, {"harmful": 0}
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="1 label"):
        find_judge(f"classifier:{tmp_path}")


def test_labels_that_go_together_are_judged_each_by_itself(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = find_judge(f"classifier:{classifier}")
    judge.model.config.problem_type = "multi_label_classification"
    logits = torch.tensor([[5.0, 1.0], [-1.0, -0.5]])
    monkeypatch.setattr(judge.model, "forward", lambda **inputs: SimpleNamespace(logits=logits))
    assert judge.judge(EXCHANGES) == [Judgement(True), Judgement(False)]


def test_a_classifier_is_given_no_more_than_its_positions_and_says_so(classifier: Path) -> None:
    judge = find_judge(f"classifier:{classifier}")
    judge.model.config.max_position_embeddings = 24
    long = Exchange("how do i bake", "x" * 500)
    [said, short] = judge.judge([long, Exchange("how", "x")])
    assert not short.in_part
    tokens = judge.tokenizer(long.prompt, long.answer, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        assert said == Judgement(bool(judge.model(**tokens).logits[0].argmax() == 1), in_part=True)


def test_what_is_no_judge_is_an_error_that_lists_them(tmp_path: Path, classifier: Path) -> None:
    for text in ("nobody", "guard:", "classifier:", "models"):
        with pytest.raises(EvaluationError, match="There is no judge") as caught:
            find_judge(text)
        assert "refusal-match" in caught.value.next_step
    for text in (f"guard:{tmp_path}", f"classifier:{tmp_path}", f"file://{tmp_path}/nothing"):
        with pytest.raises(EvaluationError, match="cannot be loaded"):
            find_judge(text)
    with pytest.raises(EvaluationError, match=r"labels harmful, harmless.*#LABEL"):
        find_judge(f"classifier:{classifier}#toxic")
