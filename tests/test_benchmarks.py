"""The benchmarks run, take turns, and state all that a row has to state."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import Contender, take_turns
from benchmarks.results import Limit, Ratio, Results, Timing

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = (
    *("apply", "concurrency", "evaluation", "forge", "promotion", "probes", "s3", "serving", "standalone"),
    "transition",
    *(("gpu",) if torch.cuda.is_available() else ()),
)


def run_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a quick run prints, and the file that it writes."""
    path = tmp_path_factory.mktemp("benchmarks") / "deep" / "results.json"
    done = run_benchmarks("--quick", "--output", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, path


@pytest.fixture(scope="module")
def results(output: tuple[str, Path]) -> dict[str, Any]:
    return json.loads(output[1].read_text())


def test_every_benchmark_gives_rows(results: dict[str, Any]) -> None:
    assert {row["benchmark"] for row in results["rows"]} == set(BENCHMARKS)
    places = [(row["benchmark"], row["case"]) for row in results["rows"]]
    assert len(set(places)) == len(places), "two rows with one name cannot be told apart"


def test_every_row_states_ours_theirs_the_ratio_and_the_limit(results: dict[str, Any]) -> None:
    for row in results["rows"]:
        assert set(row) == {"benchmark", "case", "ours", "theirs", "ratio", "limit", "figures"}
        for timing in (row["ours"], row["theirs"]):
            assert timing["what"]
            assert timing["repetitions"] > 0
            assert 0 < timing["best"] <= timing["low"] <= timing["median"] <= timing["high"] <= timing["p95"]
        assert row["ours"]["what"] != row["theirs"]["what"]
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["limit"]["what"]
        assert math.isclose(row["limit"]["share"], row["limit"]["seconds"] / row["ours"]["median"])
        assert all(math.isfinite(value) for value in row["figures"].values())


def test_what_is_compared_does_the_same_work(results: dict[str, Any]) -> None:
    rows = {row["benchmark"]: row["figures"] for row in results["rows"]}
    assert rows["apply"]["error of ours"] < 1e-6
    assert rows["apply"]["error of theirs"] < 1e-5
    assert rows["probes"]["heads chosen by both"] == 24
    assert rows["forge"]["CPU seconds of ours"] > 0
    assert rows["forge"]["peak memory beside the model, MB"] > rows["forge"]["of that the buffer, MB"]


def test_the_file_says_where_and_how_it_was_measured(results: dict[str, Any]) -> None:
    assert results["quick"] is True
    assert results["seconds"] > 0
    machine = results["machine"]
    assert machine["processor"]
    assert min(machine[name] for name in ("cores", "threads", "memory_gib", "copy_gb_per_s")) > 0
    assert {"python", "mlflow-safelock", "mlflow", "torch", "transformers"} <= set(machine["software"])


def test_the_file_is_read_back_as_what_was_measured(output: tuple[str, Path]) -> None:
    text = output[1].read_text()
    assert Results.model_validate_json(text).model_dump_json(indent=2) + "\n" == text


def test_the_table_shows_every_row(output: tuple[str, Path], results: dict[str, Any]) -> None:
    shown, path = output
    for row in results["rows"]:
        assert f"{row['benchmark']}, {row['case']}: {row['ratio']['median']:.3g}" in shown
    assert path.name in shown


def test_a_name_that_is_no_benchmark_is_refused() -> None:
    done = run_benchmarks("speed")
    assert done.returncode == 2
    assert "'speed' is not one of" in done.stderr


def test_contenders_take_turns_and_each_begins_in_its_turn() -> None:
    done: list[str] = []

    def contender(name: str) -> Contender:
        return Contender(name, lambda: done.append(name) or name, lambda result: done.append(result.upper()))

    seconds = take_turns([contender(name) for name in "abc"], repetitions=3)
    assert "".join(done) == "aAbBcC" + "aAbBcC" + "bBcCaA" + "cCaAbB", "one round first that does not count"
    assert [len(series) for series in seconds] == [3, 3, 3]


def test_seconds_count_as_often_as_is_said() -> None:
    once, often = take_turns(
        [
            Contender("once", lambda: sum(range(300_000))),
            Contender("often", lambda: sum(range(300_000)), times=1e6),
        ],
        repetitions=3,
    )
    assert min(often) > 1000 * max(once)


def test_timings_ratios_and_limits_are_what_their_names_say() -> None:
    ours, theirs = [1.0, 2.0, 4.0, 3.0, 5.0], [2.0, 2.0, 12.0, 15.0, 20.0]
    timing = Timing.of("it", ours)
    assert (timing.best, timing.low, timing.median, timing.high) == (1.0, 2.0, 3.0, 4.0)
    assert (timing.p95, timing.repetitions) == (pytest.approx(4.8), 5)
    assert Ratio.of(ours, theirs) == Ratio(median=3.0, low=2.0, high=4.0), "repetition by repetition"
    assert Limit.of("it", [0.5, 1.5, 9.0], ours) == Limit(what="it", seconds=1.5, share=0.5)
