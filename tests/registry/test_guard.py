"""No way around: what is in a gated place is served as the ledger has it, or not at all."""

from __future__ import annotations

import getpass
import json
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import sqlalchemy as sa
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LinearRegression

from mlflow_safelock.apply import attention_of
from mlflow_safelock.audit import audit
from mlflow_safelock.errors import PromotionRefused, VerificationError
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.forging.base_weights import sketch_of
from mlflow_safelock.gate import leases, promotion
from mlflow_safelock.gate.approval import Request
from mlflow_safelock.gate.guard import Guard
from mlflow_safelock.gate.leases import Work
from mlflow_safelock.gate.locked_models import LockedModels
from mlflow_safelock.gate.policy import DEFAULT_POLICY
from mlflow_safelock.gate.ports import Target
from mlflow_safelock.lock import SafetyLock
from mlflow_safelock.provenance import Actor, Contents, Span, contents_of
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from mlflow_safelock.registry.remote import RemoteArtifacts
from mlflow_safelock.registry.sql import SqlRegistry
from tests.keys import write_keys
from tests.models import tiny_model
from tests.registries import (
    BASE,
    base_lock,
    biases_of,
    expected_biases,
    fine_tune,
    just_before,
    log_fine_tune,
    register_lock,
    state_of,
)
from tests.registry.test_promotion import alias, ledger_rows, open_with_policy, stage

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")


def download_uri(client: MlflowClient, version: int, name: str = "bot") -> str:
    return client.get_model_version_download_uri(name, str(version))


def store_of(client: MlflowClient) -> Any:
    return client._get_registry_client().store


def edit_row(folder: Path, statement: str, *values: object) -> None:
    """What somebody does who can write to the database."""
    with sqlite3.connect(folder / "registry.db") as connection:
        assert connection.execute(statement, values).rowcount == 1


@contextmanager
def stock_registry(folder: Path) -> Iterator[None]:
    """The same database as a client has it that knows nothing of the gate."""
    gated = mlflow.get_registry_uri()
    mlflow.set_registry_uri(f"sqlite:///{folder}/registry.db")
    yield
    mlflow.set_registry_uri(gated)


def to_staging(name: str, version: int) -> Request:
    """Somebody's request for a promotion to Staging."""
    return Request(name, version, Target("stage", "Staging"), Actor(name="alice", verified=False), "default")


def log_prices() -> None:
    """Register a model that is no language model."""
    with mlflow.start_run():
        mlflow.sklearn.log_model(
            LinearRegression().fit([[0.0], [1.0]], [0.0, 1.0]),
            name="model",
            registered_model_name="prices",
            pip_requirements=["scikit-learn"],
            serialization_format="cloudpickle",
        )


def locked_version(client: MlflowClient) -> tuple[int, str]:
    """A promoted version, and where it was before."""
    version = log_fine_tune("bot")
    original = download_uri(client, version)
    register_lock(base_lock())
    stage(client, version)
    return version, original


def loaded_biases(uri: str = "models:/bot/Staging") -> dict[int, np.ndarray]:
    return biases_of(mlflow.pyfunc.load_model(uri)._model_impl.pipeline.model)


class TestReads:
    def test_a_row_that_was_edited_back_to_the_unlocked_model_is_not_served(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        version, original = locked_version(client)
        edit_row(tmp_path, "UPDATE model_versions SET storage_location=? WHERE name='bot'", original)
        with pytest.raises(MlflowException, match=r"not_locked.*stage:Staging.*Promote it again") as info:
            download_uri(client, version)
        assert info.value.error_code == "PERMISSION_DENIED"
        with pytest.raises(MlflowException, match="not_locked"):
            mlflow.pyfunc.load_model("models:/bot/Staging")
        stage(client, version)
        assert loaded_biases()

    def test_a_stage_that_was_set_past_the_gate_is_not_served(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        version = log_fine_tune("bot")
        register_lock(base_lock())
        edit_row(tmp_path, "UPDATE model_versions SET current_stage='Production' WHERE name='bot'")
        for _ in range(3):
            with pytest.raises(MlflowException, match=r"not_locked.*knows no promotion"):
                download_uri(client, version)
        (row,) = ledger_rows(tmp_path)
        assert (row["event"], row["reason"], row["target"]) == ("rejected", "not_locked", "read:download")
        assert "stage:Production" in row["message"]
        edit_row(tmp_path, "UPDATE model_versions SET current_stage='Staging' WHERE name='bot'")
        for _ in range(2):
            with pytest.raises(MlflowException, match="not_locked"):
                download_uri(client, version)
        assert [row["event"] for row in ledger_rows(tmp_path)] == 2 * ["rejected"], "a row for each fault"

    def test_who_reads_many_versions_in_turn_leaves_one_row_for_each_and_its_fault(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{not_an_llm: reject}]\n")
        client.create_registered_model("bot")
        for _ in range(60):
            client.create_model_version("bot", "/nowhere")
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            connection.execute("UPDATE model_versions SET current_stage='Staging'")

        def read(*versions: int) -> list[int]:
            for version in versions:
                with pytest.raises(MlflowException, match="not_locked"):
                    download_uri(client, version)
            return [row["version"] for row in ledger_rows(tmp_path) if row["event"] == "rejected"]

        each = list(range(1, 61))
        assert read(*each) == each
        assert read(*each) == each

        request = Request("bot", 60, Target("stage", "Staging"), Actor(name="x", verified=False), "default")
        promoted = request.row("promoted", DEFAULT_POLICY, location="/nowhere")
        store_of(client)._gate.registry.record(promoted)
        numbers = count()

        def fail(*_: object) -> None:
            raise VerificationError(f"The copy at /tmp/{next(numbers)} is another.")

        monkeypatch.setattr(LockedModels, "check_as_decided", fail)
        assert read(60) == [*each, 60]
        assert read(60) == [*each, 60], "the same fault, in other words each time"

    def test_nothing_is_registered_from_a_version_that_may_not_be_read(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        version = log_fine_tune("bot")
        edit_row(tmp_path, "UPDATE model_versions SET current_stage='Production' WHERE name='bot'")
        client.create_registered_model("other")
        with pytest.raises(MlflowException, match=r"not_locked") as info:
            client.create_model_version("other", f"models:/bot/{version}")
        assert info.value.error_code == "PERMISSION_DENIED"
        assert client.search_model_versions("name='other'") == []

    def test_an_alias_of_a_stock_client_is_not_served(self, client: MlflowClient, tmp_path: Path) -> None:
        version = log_fine_tune("bot")
        register_lock(base_lock())
        stock = MlflowClient(mlflow.get_tracking_uri(), f"sqlite:///{tmp_path}/registry.db")
        stock.set_registered_model_alias("bot", "Champion", str(version))
        with pytest.raises(MlflowException, match=r"not_locked.*alias:Champion"):
            mlflow.pyfunc.load_model("models:/bot@Champion")
        client.set_registered_model_alias("bot", "champion", str(version))
        assert loaded_biases("models:/bot@champion")

    def test_a_promotion_in_the_middle_of_a_read_is_no_reason_to_refuse_it(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version, _ = locked_version(client)
        first = download_uri(client, version)
        register_lock(base_lock(seed=1))

        def promoting_after(method: str, about: type) -> None:
            """Have the version promoted right after the next call of a method, whatever reads it."""
            stock = getattr(about, method)

            def then_promoted(*arguments: Any) -> Any:
                found = stock(*arguments)
                monkeypatch.setattr(about, method, stock)
                stage(client, version)
                return found

            monkeypatch.setattr(about, method, then_promoted)

        promoting_after("model_version", SqlRegistry)
        second = download_uri(client, version)
        assert second != first
        register_lock(base_lock(seed=2))
        promoting_after("check_read", Guard)
        assert download_uri(client, version) == second, "what was looked at, and nothing else"
        assert download_uri(client, version) not in (first, second)
        assert [row["event"] for row in ledger_rows(tmp_path)] == 3 * ["promoted"]

    def test_the_locked_model_of_an_earlier_promotion_does_not_come_back(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        version, _ = locked_version(client)
        first = download_uri(client, version)
        register_lock(base_lock(seed=1))
        stage(client, version)
        edit_row(tmp_path, "UPDATE model_versions SET storage_location=? WHERE name='bot'", first)
        with pytest.raises(MlflowException, match="not_locked"):
            download_uri(client, version)

    def test_a_model_of_another_kind_that_was_there_before_the_gate_is_served(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        log_prices()
        edit_row(tmp_path, "UPDATE model_versions SET current_stage='Staging' WHERE name='prices'")
        for _ in range(2):
            assert download_uri(client, 1, "prices")
        (row,) = ledger_rows(tmp_path)
        assert (row["event"], row["target"]) == ("passed", "read:download")

    def test_what_was_let_through_as_another_kind_is_looked_at_again_once_it_is_written_over(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        log_prices()
        stage(client, 1, "prices")
        folder = Path(download_uri(client, 1, "prices"))
        (folder / "notes.txt").write_text("harmless")
        assert download_uri(client, 1, "prices"), "it is no language model still"
        assert [row["event"] for row in ledger_rows(tmp_path)] == ["passed", "passed"]
        fine_tuned = Path(download_uri(client, log_fine_tune("bot")))
        shutil.rmtree(folder)
        shutil.copytree(fine_tuned, folder)
        with pytest.raises(
            MlflowException, match=r"not_locked.*is not what was let through.*Promote it again"
        ):
            download_uri(client, 1, "prices")
        register_lock(base_lock())
        stage(client, 1, "prices")
        assert loaded_biases("models:/prices/Staging")

    def test_what_goes_on_record_is_what_was_looked_at(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log_prices()
        folder, other = Path(download_uri(client, 1, "prices")), tmp_path / "other"
        (folder / "extra.pkl").write_bytes(bytes(2 << 20))
        shutil.copytree(folder, other)
        named = b"ctransformers.models.llama.modeling_llama\nLlamaForCausalLM\n"
        (other / "extra.pkl").write_bytes(named + bytes((2 << 20) - len(named)))

        def swap() -> None:
            for old, new in ((folder, tmp_path / "third"), (other, folder), (tmp_path / "third", other)):
                old.rename(new)

        def swapped(reader: Any) -> Contents:
            swap()
            try:
                return contents_of(reader)
            finally:
                swap()

        with monkeypatch.context() as patch:
            patch.setattr(promotion, "contents_of", swapped)
            stage(client, 1, "prices")
        assert download_uri(client, 1, "prices")
        assert [row["event"] for row in ledger_rows(tmp_path)] == ["passed"]
        swap()
        with pytest.raises(MlflowException, match=r"not_locked.*is not what was let through"):
            download_uri(client, 1, "prices")

    def test_a_store_without_parts_is_not_read_whole_at_each_read(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[str] = []

        class Recorded(RemoteArtifacts):
            def read_many(self, path: str, spans: Sequence[Span]) -> list[bytes]:
                asked.append(path)
                return super().read_many(path, spans)

        log_prices()
        folder = Path(download_uri(client, 1, "prices"))
        (folder / "table.csv").write_bytes(bytes(2 << 20))
        stores = RegistryArtifacts.reader
        remote = Recorded(folder.as_uri())
        monkeypatch.setattr(
            RegistryArtifacts,
            "reader",
            lambda self, uri: replace(remote) if uri == str(folder) else stores(self, uri),
        )
        stage(client, 1, "prices")
        asked.clear()
        assert download_uri(client, 1, "prices")
        assert "MLmodel" in asked
        assert "table.csv" not in asked
        asked.clear()
        assert download_uri(client, 1, "prices")
        assert asked == [], "it was compared just now"
        (folder / "table.csv").write_bytes(bytes(3 << 20))
        assert download_uri(client, 1, "prices")
        events = [row["event"] for row in ledger_rows(tmp_path)]
        assert events == ["passed", "passed"], "it has another size, and is looked at again"

    def test_a_language_model_that_was_let_through_is_served_as_it_was_alone(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lenient = "version: 1\ngates: [{missing_lock: allow}]\n"
        client = open_with_policy(tmp_path, monkeypatch, lenient)
        version = log_fine_tune("bot")
        stage(client, version)
        (weights,) = Path(download_uri(client, version)).rglob("model.safetensors")
        before = weights.read_bytes()
        weights.write_bytes(before[:-4096] + bytes(4096))
        with pytest.raises(MlflowException, match=r"not_locked.*is not what was let through"):
            download_uri(client, version)
        weights.write_bytes(before)
        assert download_uri(client, version)
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{}]\n")
        with pytest.raises(MlflowException, match=r"not_locked.*lets no such version through"):
            download_uri(client, version)

    def test_what_is_in_no_gated_place_is_served_as_it_is(self, client: MlflowClient, tmp_path: Path) -> None:
        version = log_fine_tune("bot")
        client.set_registered_model_alias("bot", "experiment", str(version))
        assert not biases_of(mlflow.pyfunc.load_model("models:/bot@experiment")._model_impl.pipeline.model)
        assert ledger_rows(tmp_path) == []

    def test_a_policy_may_only_warn_while_a_registry_is_brought_behind_the_gate(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        version = log_fine_tune("bot")
        edit_row(tmp_path, "UPDATE model_versions SET current_stage='Staging' WHERE name='bot'")
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates:\n  - reads: warn\n")
        assert download_uri(client, version)
        assert "[not_locked]" in caplog.text


class TestRenames:
    POLICY = 'version: 1\ngates:\n  - models: "support-*"\n'

    def test_an_unlocked_model_in_a_stage_gets_no_gated_name(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = open_with_policy(tmp_path, monkeypatch, self.POLICY)
        version = log_fine_tune("free")
        register_lock(base_lock())
        stage(client, version, "free")
        with pytest.raises(MlflowException, match=r"not_locked.*'support-x'.*stage:Staging"):
            client.rename_registered_model("free", "support-x")
        assert client.get_registered_model("free").name == "free"
        row = ledger_rows(tmp_path)[-1]
        assert (row["event"], row["model"], row["version"]) == ("rejected", "free", version)
        assert (row["reason"], row["target"]) == ("not_locked", "rename:support-x")
        client.transition_model_version_stage("free", str(version), "None")
        client.rename_registered_model("free", "support-x")
        stage(client, version, "support-x")
        assert loaded_biases("models:/support-x/Staging")

    def test_a_model_that_was_let_through_gets_no_name_under_which_it_would_not_be(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = 'version: 1\ngates:\n  - {models: "sandbox-*", missing_lock: allow}\n  - {models: "*"}\n'
        client = open_with_policy(tmp_path, monkeypatch, policy)
        version = log_fine_tune("sandbox-x")
        stage(client, version, "sandbox-x")
        assert download_uri(client, version, "sandbox-x")
        with pytest.raises(MlflowException, match=r"not_locked.*asks for more than it was promoted with"):
            client.rename_registered_model("sandbox-x", "prod-x")
        client.rename_registered_model("sandbox-x", "sandbox-y")
        assert download_uri(client, version, "sandbox-y")

    def test_a_locked_model_gets_no_name_under_which_its_promotion_would_be_refused(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key = write_keys(tmp_path).public.name
        signed = f"signature: {{required: true, public_keys: [{key}]}}"
        gates = {
            "sandbox-*": "reads: refuse",
            "signed-*": signed,
            "measured-*": "evaluation: {}",
            "young-*": "lock: {max_age_days: 1}",
            "weak-*": "alpha: {default: 3.0, max: 4.0}",
            "same-*": "reads: refuse",
        }
        lines = "".join(f'  - {{models: "{models}", {rule}}}\n' for models, rule in gates.items())
        client = open_with_policy(tmp_path, monkeypatch, f"version: 1\ngates:\n{lines}")
        version = log_fine_tune("sandbox-x")
        old = base_lock()
        created = old.metadata.model_copy(update={"created": "2020-01-01T00:00:00+00:00"})
        register_lock(SafetyLock(old.heads, created, old.scores))
        stage(client, version, "sandbox-x")
        for name, reason in (
            ("signed-x", "unsigned_lock"),
            ("measured-x", "missing_evaluation"),
            ("young-x", "lock_expired"),
            ("weak-x", "not_locked"),
        ):
            with pytest.raises(MlflowException, match=rf"\[{reason}\].*{name}.*stage:Staging.*rename, and"):
                client.rename_registered_model("sandbox-x", name)
            assert ledger_rows(tmp_path)[-1]["target"] == f"rename:{name}"
        with stock_registry(tmp_path):
            MlflowClient().rename_registered_model("sandbox-x", "signed-x")
        store_of(client).rename_registered_model("sandbox-x", "signed-x")  # as if only its rows were missing
        with pytest.raises(MlflowException, match=r"not_locked.*knows no promotion"):
            download_uri(client, version, "signed-x")
        with stock_registry(tmp_path):
            MlflowClient().rename_registered_model("signed-x", "sandbox-x")
        client.rename_registered_model("sandbox-x", "same-x")
        assert download_uri(client, version, "same-x")

    def test_a_locked_place_that_is_registered_anew_is_no_renamed_model(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        version, _ = locked_version(client)
        location = download_uri(client, version)
        client.delete_registered_model("bot")
        client.create_registered_model("helper")
        client.create_model_version("helper", location)
        edit_row(tmp_path, "UPDATE model_versions SET current_stage='Staging' WHERE name='helper'")
        with pytest.raises(MlflowException, match=r"RESOURCE_DOES_NOT_EXIST|not found"):
            client.rename_registered_model("bot", "helper")
        with pytest.raises(MlflowException, match="not_locked"):
            download_uri(client, 1, "helper")
        assert [row["event"] for row in ledger_rows(tmp_path)] == ["promoted", "rejected"]

    def test_a_copy_that_was_promoted_itself_is_renamed_once_more_and_a_copy_of_what_is_locked_is_not(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        log_fine_tune("source")
        register_lock(base_lock())
        client.copy_model_version("models:/source/1", "bot")
        stage(client, 1)
        location = download_uri(client, 1)
        client.copy_model_version("models:/bot/1", "thief")
        with stock_registry(tmp_path):
            MlflowClient().rename_registered_model("bot", "helper")
        edit_row(tmp_path, "UPDATE model_versions SET current_stage='Staging' WHERE name='thief'")
        with pytest.raises(MlflowException, match=r"RESOURCE_DOES_NOT_EXIST|not found"):
            store_of(client).rename_registered_model("bot", "thief")
        with pytest.raises(MlflowException, match="not_locked"):
            download_uri(client, 1, "thief")
        store_of(client).rename_registered_model("bot", "helper")
        assert download_uri(client, 1, "helper") == location

    def test_a_locked_model_stays_locked_and_served_under_its_new_name(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        version, _ = locked_version(client)
        location = download_uri(client, version)
        client.rename_registered_model("bot", "helper")
        assert download_uri(client, version, "helper") == location
        assert loaded_biases("models:/helper/Staging")
        stage(client, version, "helper")
        assert [row["event"] for row in ledger_rows(tmp_path)] == ["promoted", "renamed"]


class TestRepair:
    @pytest.mark.parametrize("damage", ["gone", "edited", "another receipt"])
    def test_promoting_again_writes_a_locked_model_again_that_was_damaged(
        self, client: MlflowClient, damage: str
    ) -> None:
        version, _ = locked_version(client)
        folder = Path(download_uri(client, version))
        if damage == "gone":
            shutil.rmtree(folder)
        elif damage == "edited":
            (folder / "MLmodel").write_text((folder / "MLmodel").read_text() + "\n")
        else:
            receipt = json.loads((folder / "receipt.json").read_text())
            receipt["predicate"]["promotion"]["actor"]["name"] = "somebody else"
            import rfc8785

            (folder / "receipt.json").write_bytes(rfc8785.dumps(receipt))
        if damage != "another receipt":
            with pytest.raises(
                MlflowException, match=r"not_locked.*(no receipt|'MLmodel').*Promote it again"
            ):
                mlflow.pyfunc.load_model("models:/bot/Staging")
        else:
            with pytest.raises(
                MlflowException, match=r"not_locked.*receipt.*is not the one of the promotion"
            ):
                download_uri(client, version)
        stage(client, version)
        assert Path(download_uri(client, version)) != folder
        assert loaded_biases()

    def test_a_source_that_changed_is_not_promoted_again(self, client: MlflowClient) -> None:
        version, original = locked_version(client)
        path = Path(original) / "model" / "generation_config.json"
        path.write_text(path.read_text().replace("8", "9"))
        with pytest.raises(MlflowException, match=r"source_changed.*generation_config\.json.*new version"):
            client.transition_model_version_stage("bot", str(version), "Production")


class TestAlphaOfItsOwn:
    def test_a_version_may_ask_for_a_strength_within_the_range(self, client: MlflowClient) -> None:
        components = fine_tune()
        version = log_fine_tune("bot", components)
        lock = base_lock()
        register_lock(lock)
        client.set_model_version_tag("bot", str(version), "safelock.alpha", "4.5")
        stage(client, version)
        found = loaded_biases()
        for layer, bias in expected_biases(components["model"], lock, 4.5).items():
            np.testing.assert_allclose(found[layer], bias, rtol=1e-5, atol=1e-6)
        client.set_model_version_tag("bot", str(version), "safelock.alpha", "3")
        stage(client, version)
        found = loaded_biases()
        for layer, bias in expected_biases(components["model"], lock, 3.0).items():
            np.testing.assert_allclose(found[layer], bias, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "asked", ["-6", "0", "nan", "inf", "true", "six", "", "1e1", "12.5", "0.5", "+6", " 6", "6,0", "0x6"]
    )
    def test_every_other_request_is_refused(self, client: MlflowClient, asked: str) -> None:
        version = log_fine_tune("bot")
        register_lock(base_lock())
        client.set_model_version_tag("bot", str(version), "safelock.alpha", asked)
        before = state_of(client, "bot", version)
        with pytest.raises(MlflowException, match=r"bad_alpha|alpha_out_of_range") as info:
            stage(client, version)
        assert info.value.error_code == "INVALID_PARAMETER_VALUE"
        assert state_of(client, "bot", version) == before


class TestDescent:
    def sketched(self, base: torch.nn.Module) -> SafetyLock:
        lock = base_lock()
        return SafetyLock(lock.heads, lock.metadata, lock.scores, None, sketch_of(attention_of(base)))

    def test_a_descendant_passes_and_its_kinship_is_on_record(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        components = fine_tune()
        register_lock(self.sketched(components["model"]))
        version = log_fine_tune("bot", components)
        stage(client, version)
        assert ledger_rows(tmp_path)[-1]["kinship"] == pytest.approx(1.0, abs=1e-4)
        assert state_of(client, "bot", version)["tags"]["safelock.kinship"] == "1.0000"

    def test_a_stranger_of_the_same_shape_is_refused(self, client: MlflowClient, tmp_path: Path) -> None:
        register_lock(self.sketched(tiny_model("llama", seed=77)))
        version = log_fine_tune("bot")
        before = state_of(client, "bot", version)
        with pytest.raises(
            MlflowException, match=r"not_a_descendant.*cosine.*'safelock\.base_model'"
        ) as info:
            stage(client, version)
        assert info.value.error_code == "RESOURCE_CONFLICT"
        assert state_of(client, "bot", version) == before
        assert ledger_rows(tmp_path)[-1]["reason"] == "not_a_descendant"

    def test_a_policy_may_refuse_what_cannot_be_compared(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = "version: 1\ngates:\n  - kinship: {unknown: reject}\n"
        client = open_with_policy(tmp_path, monkeypatch, policy)
        version = log_fine_tune("bot")
        register_lock(base_lock())
        with pytest.raises(MlflowException, match=r"kinship_unknown.*no sketch.*safelock lock enroll"):
            stage(client, version)


class TestUnlocking:
    def test_a_version_in_no_gated_place_gets_its_fine_tune_back(
        self, client: MlflowClient, tmp_path: Path
    ) -> None:
        version, original = locked_version(client)
        with pytest.raises(PromotionRefused, match=r"stage:Staging, where only locked") as info:
            store_of(client).unlock("bot", version, "to retrain it")
        assert info.value.reason == "still_gated"
        row = ledger_rows(tmp_path)[-1]
        assert (row["event"], row["reason"], row["target"]) == ("rejected", "still_gated", "unlock:registry")
        client.transition_model_version_stage("bot", str(version), "Archived")
        assert loaded_biases(f"models:/bot/{version}"), "leaving a stage takes no lock off"
        client.set_model_version_tag("bot", str(version), "team", "support")
        store_of(client).unlock("bot", version, "to retrain it")
        assert download_uri(client, version) == original
        assert state_of(client, "bot", version)["tags"] == {"safelock.state": "unlocked", "team": "support"}
        (audited,) = audit(f"sqlite:///{tmp_path}/registry.db", models="bot")
        assert (audited.state, audited.drift) == ("unlocked", ())
        client.set_model_version_tag("bot", str(version), "safelock.kinship", "1.0000")
        (audited,) = audit(f"sqlite:///{tmp_path}/registry.db", models="bot")
        assert audited.drift == ("It has tags of a promotion (safelock.kinship), and none is on record.",)
        assert not loaded_biases(f"models:/bot/{version}")
        row = ledger_rows(tmp_path)[-1]
        assert (row["event"], row["message"]) == ("unlocked", "to retrain it")
        stage(client, version)
        assert loaded_biases()

    def test_one_that_took_longer_than_others_wait_for_it_unlocks_nothing(
        self, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A promotion that saw nobody at it any more has been answered as locked."""
        version, _ = locked_version(client)
        client.transition_model_version_stage("bot", str(version), "None")
        before = state_of(client, "bot", version)
        with monkeypatch.context() as patched:
            patched.setitem(leases.SECONDS, "unlock", 1.0)
            with pytest.raises(PromotionRefused, match="took longer") as refused:
                store_of(client).unlock("bot", version, "slowly")
        assert refused.value.reason == "conflict"
        assert state_of(client, "bot", version) == before
        store_of(client).unlock("bot", version, "at once")

    def test_what_is_not_locked_is_not_unlocked(self, client: MlflowClient) -> None:
        version = log_fine_tune("bot")
        with pytest.raises(PromotionRefused, match="is not locked"):
            store_of(client).unlock("bot", version, "why not")

    def test_a_policy_may_forbid_it(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version, _ = locked_version(client)
        client.transition_model_version_stage("bot", str(version), "None")
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{}]\nunlock: deny\n")
        with pytest.raises(PromotionRefused, match="lets nobody"):
            store_of(client).unlock("bot", version, "why not")


class TestUnlockedBetweenTheGateAndThePromotion:
    """The version is in no gated place yet, so whoever may unlock it can."""

    PLACES = pytest.mark.parametrize(
        ("promote", "statement"),
        [(stage, "UPDATE model_versions"), (alias, "INSERT INTO registered_model_aliases")],
    )

    @staticmethod
    def locked_in_no_place(client: MlflowClient) -> tuple[int, str]:
        version, original = locked_version(client)
        client.transition_model_version_stage("bot", str(version), "None")
        return version, original

    @PLACES
    def test_it_is_locked_again_before_the_promotion_is_answered(
        self, client: MlflowClient, tmp_path: Path, promote: Callable[..., None], statement: str
    ) -> None:
        version, original = self.locked_in_no_place(client)
        with just_before(statement, lambda: store_of(client).unlock("bot", version, "meanwhile")):
            promote(client, version)
        assert download_uri(client, version) != original
        assert loaded_biases(f"models:/bot/{version}")
        events = [row["event"] for row in ledger_rows(tmp_path)]
        assert events[-3:] == ["promoted", "unlocked", "promoted"]

    @PLACES
    def test_where_it_cannot_be_the_client_is_told(
        self, client: MlflowClient, promote: Callable[..., None], statement: str
    ) -> None:
        version, _ = self.locked_in_no_place(client)

        def unlock_and_revoke() -> None:
            store_of(client).unlock("bot", version, "meanwhile")
            store_of(client).revoke_lock(lock_model_name(BASE), 1, "meanwhile")

        with (
            just_before(statement, unlock_and_revoke),
            pytest.raises(
                MlflowException, match=r"taken off while it came to .*, where it is now, \[lock_rev"
            ),
        ):
            promote(client, version)
        with pytest.raises(MlflowException, match="not_locked"):
            download_uri(client, version)

    @PLACES
    def test_one_that_is_under_way_is_waited_for(
        self, client: MlflowClient, promote: Callable[..., None], statement: str
    ) -> None:
        version, original = self.locked_in_no_place(client)
        has_begun, may_go_on, looks = threading.Event(), threading.Event(), count(1)
        unlock, done = store_of(client).unlock, []
        unlocking = threading.Thread(target=lambda: done.append(unlock("bot", version, "meanwhile")))

        def hold_it_up(_connection: Any, _cursor: Any, sent: str, *_more: Any) -> None:
            if threading.current_thread() is unlocking:
                if sent.startswith("UPDATE model_versions"):
                    has_begun.set()
                    may_go_on.wait(20)
            elif sent.startswith(statement) and unlocking.ident is None:
                unlocking.start()
                assert has_begun.wait(20)
            # The promotion looks whether somebody is unlocking it, and then asks for the lease.
            elif "FROM safelock_leases" in sent and has_begun.is_set() and next(looks) == 2:
                may_go_on.set()

        sa.event.listen(sa.Engine, "before_cursor_execute", hold_it_up)
        try:
            promote(client, version)
        finally:
            may_go_on.set()
            unlocking.join()
            sa.event.remove(sa.Engine, "before_cursor_execute", hold_it_up)
        assert done == [original]
        assert loaded_biases(f"models:/bot/{version}")

    def test_what_is_not_gated_does_not_ask(self, client: MlflowClient) -> None:
        version, _ = self.locked_in_no_place(client)
        asked: list[str] = []

        def listen(_connection: Any, _cursor: Any, sent: str, *_more: Any) -> None:
            asked.extend([sent] if "safelock" in sent else [])

        sa.event.listen(sa.Engine, "before_cursor_execute", listen)
        try:
            client.transition_model_version_stage("bot", str(version), "Archived")
            client.set_registered_model_alias("bot", "experiment", str(version))
            assert asked == []
            stage(client, version)
            assert asked
        finally:
            sa.event.remove(sa.Engine, "before_cursor_execute", listen)


class TestWhoMayOverride:
    """Outside a server with MLflow's authentication every name is only claimed, that of these tests too."""

    ONLY = "version: 1\ngates: [{{}}]\n{key}: {{by: ['*']}}\n"

    def test_a_claimed_name_is_none_that_may_unlock_or_revoke(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        version, original = locked_version(client)
        client.transition_model_version_stage("bot", str(version), "None")
        client = open_with_policy(tmp_path, monkeypatch, self.ONLY.format(key="unlock"))
        with pytest.raises(PromotionRefused, match=r"lets \*, authenticated.*is only claimed") as info:
            store_of(client).unlock("bot", version, "why not")
        assert info.value.reason == "unlock_denied"
        (tmp_path / "safelock.yaml").write_text(self.ONLY.format(key="revoke"))
        with pytest.raises(PromotionRefused, match=r"revoke a lock.*is only claimed") as info:
            store_of(client).revoke_lock(lock_model_name(BASE), 1, "why not")
        assert info.value.reason == "revoke_denied"
        refused = [(row["event"], row["reason"], row["target"]) for row in ledger_rows(tmp_path)[-2:]]
        assert refused == [
            ("rejected", "unlock_denied", "unlock:registry"),
            ("rejected", "revoke_denied", "lock:revoked"),
        ]
        named = f"version: 1\ngates: [{{}}]\nunlock: {{by: [{getpass.getuser()}], claimed: allow}}\n"
        (tmp_path / "safelock.yaml").write_text(named)
        assert store_of(client).unlock("bot", version, "to retrain it") == original

    def test_another_alpha_than_the_default_is_for_those_who_may(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = open_with_policy(tmp_path, monkeypatch, self.ONLY.format(key="other_alpha"))
        version = log_fine_tune("bot")
        register_lock(base_lock())
        client.set_model_version_tag("bot", str(version), "safelock.alpha", "4.5")
        with pytest.raises(MlflowException, match=r"alpha_denied.*than 6 \(the version asks for 4\.5\)"):
            stage(client, version)
        client.set_model_version_tag("bot", str(version), "safelock.alpha", "6.0")
        stage(client, version)
        assert ledger_rows(tmp_path)[-1]["alpha"] == 6.0


class TestPolicyThatChanges:
    def test_one_that_comes_while_a_promotion_waits_decides_over_it(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{}]\n")
        version = log_fine_tune("bot")
        register_lock(base_lock())
        waits, stock = threading.Event(), promotion.reach
        monkeypatch.setattr(
            promotion, "reach", lambda name: (stock(name), name == "policy-read" and waits.set())
        )
        registry = store_of(client)._gate.registry
        with ThreadPoolExecutor(1) as pool:
            with registry.lease(Work("default", "bot", version)):
                promoted = pool.submit(stage, client, version)
                assert waits.wait(60)
                (tmp_path / "safelock.yaml").write_text("version: 1\ngates: [{lock: {min_version: 5}}]\n")
            with pytest.raises(MlflowException, match=r"lock_too_old.*version 5"):
                promoted.result()
        row = ledger_rows(tmp_path)[-1]
        assert (row["event"], row["policy"]) == ("rejected", store_of(client)._gate.policy().digest)
        assert client.get_model_version("bot", str(version)).current_stage == "None"

    def test_a_changed_file_is_in_force_at_once_and_a_broken_one_never(
        self, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
    ) -> None:
        client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{stages: [Production]}]\n")
        version = log_fine_tune("bot")
        stage(client, version)  # not gated
        client.transition_model_version_stage("bot", str(version), "None")
        (tmp_path / "safelock.yaml").write_text("version: 1\ngates: [{}]\n")
        with pytest.raises(MlflowException, match="missing_lock"):
            stage(client, version)
        (tmp_path / "safelock.yaml").write_text("version: 1\ngates: [{stages: [Nowhere]}]\n")
        with pytest.raises(MlflowException, match="missing_lock"):
            stage(client, version)
        assert "cannot be used" in caplog.text
        (tmp_path / "safelock.yaml").unlink()
        with pytest.raises(MlflowException, match="missing_lock"):
            stage(client, version)
        with sqlite3.connect(tmp_path / "registry.db") as connection:
            rows = connection.execute("SELECT body FROM safelock_ledger WHERE event='policy'").fetchall()
        digests = [json.loads(body)["policy"] for (body,) in rows]
        assert len(digests) == 3, "the default, the first file, the second"
        assert all(one != other for one, other in pairwise(digests))


def log_pickled_language_model() -> None:
    model = fine_tune()["model"]
    with mlflow.start_run():
        mlflow.pytorch.log_model(
            model,
            name="model",
            registered_model_name="bot",
            pip_requirements=["torch"],
            serialization_format="pickle",
        )


def log_under_another_task() -> None:
    version = log_fine_tune("other")
    del version
    folder = Path(MlflowClient().get_model_version_download_uri("other", "1"))
    path = folder / "MLmodel"
    text = path.read_text().replace("text-generation", "feature-extraction")
    path.write_text(text.replace("LlamaForCausalLM", "LlamaModel").replace("TextGenerationPipeline", "X"))
    MlflowClient().create_registered_model("bot")
    MlflowClient().create_model_version("bot", str(folder))


def log_gguf() -> None:
    class Nothing(mlflow.pyfunc.PythonModel):
        def predict(self, context: Any, model_input: list[str]) -> list[str]:
            return model_input

    weights = Path("model.gguf")
    weights.write_bytes(b"GGUF")
    with mlflow.start_run():
        mlflow.pyfunc.log_model(
            name="model",
            python_model=Nothing(),
            artifacts={"weights": str(weights)},
            registered_model_name="bot",
            pip_requirements=["mlflow"],
        )


@pytest.mark.parametrize("log", [log_pickled_language_model, log_under_another_task, log_gguf])
def test_a_language_model_in_disguise_is_refused(client: MlflowClient, log: Callable[[], None]) -> None:
    register_lock(base_lock())
    log()
    before = state_of(client, "bot", 1)
    with pytest.raises(MlflowException, match=r"unsupported_flavor.*mlflow\.transformers"):
        stage(client, 1)
    assert state_of(client, "bot", 1) == before


def missing_shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    save_file({names[0]: tensors[names[0]]}, folder / "model-00001-of-00002.safetensors")
    places = {name: f"model-0000{2 if name != names[0] else 1}-of-00002.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def without_projections(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "o_proj" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def already_locked(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "safelock": {"alpha": 6}}))


def hopeless_config(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (missing_shard, r"unreadable.*00002-of-00002"),
        (without_projections, r"unreadable.*lack the attention output projection"),
        (cut_off, r"unreadable.*cut off"),
        (already_locked, "already_locked"),
        (hopeless_config, r"unreadable|failed"),
    ],
)
def test_a_damaged_fine_tune_is_refused_with_a_row(
    client: MlflowClient, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    register_lock(base_lock())
    version = log_fine_tune("bot")
    damage(Path(download_uri(client, version)) / "model")
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=reason) as info:
        stage(client, version)
    assert info.value.get_http_status_code() < 500
    assert state_of(client, "bot", version) == before
    assert ledger_rows(tmp_path)[-1]["event"] == "rejected"


@pytest.mark.parametrize("stage_name", ["staging", "STAGING", "Staging"])
def test_a_stage_is_gated_in_any_case_of_its_letters(client: MlflowClient, stage_name: str) -> None:
    version = log_fine_tune("bot")
    with pytest.raises(MlflowException, match="missing_lock"):
        client.transition_model_version_stage("bot", str(version), stage_name)


def test_a_policy_may_want_language_models_only(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{not_an_llm: reject}]\n")
    log_prices()
    with pytest.raises(MlflowException, match="not_an_llm"):
        stage(client, 1, "prices")


def test_a_changed_alpha_of_the_policy_locks_anew(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version, _ = locked_version(client)
    before = download_uri(client, version)
    client = open_with_policy(tmp_path, monkeypatch, "version: 1\ngates: [{alpha: {default: 3.0}}]\n")
    stage(client, version)
    assert download_uri(client, version) != before
    assert ledger_rows(tmp_path)[-1]["alpha"] == 3.0


def test_a_location_that_mlflow_cannot_hold_is_a_refusal(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_safelock.gate import places

    version = log_fine_tune("bot")
    register_lock(base_lock())
    monkeypatch.setattr(places, "MAX_LOCATION", 40)
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=r"location_too_long.*holds 40"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_an_overlay_that_does_not_read_back_is_not_promoted(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow_safelock.registry.artifacts import RegistryArtifacts

    version = log_fine_tune("bot")
    register_lock(base_lock())
    before = state_of(client, "bot", version)
    publish = RegistryArtifacts.publish

    def another_twin(self: RegistryArtifacts, folder: Path, uri: str) -> None:
        receipt = folder / "receipt.json"
        receipt.write_bytes(receipt.read_bytes().replace(b'"verified":false', b'"verified":true'))
        publish(self, folder, uri)

    monkeypatch.setattr(RegistryArtifacts, "publish", another_twin)
    with pytest.raises(MlflowException, match="not_written"):
        stage(client, version)
    assert state_of(client, "bot", version) == before


def test_a_store_that_does_not_answer_is_told_to_be_worth_another_try(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    client.create_registered_model("away")
    client.create_model_version("away", "http://127.0.0.1:1/api/2.0/mlflow-artifacts/artifacts/model")
    for _ in range(2):
        with pytest.raises(MlflowException, match=r"\[unreachable\].*over in a while: do it again") as info:
            stage(client, 1, "away")
        assert info.value.get_http_status_code() == 409
    assert ledger_rows(tmp_path)[-1]["reason"] == "unreachable"
    edit_row(tmp_path, "UPDATE model_versions SET current_stage='Staging' WHERE name='away'")
    with pytest.raises(MlflowException, match=r"\[unreachable\].*do it again") as info:
        download_uri(client, 1, "away")
    assert info.value.get_http_status_code() == 409


@pytest.mark.parametrize(
    ("error", "reason", "told"),
    [
        (RuntimeError("boom"), "failed", "boom Nothing was promoted. The server's log"),
        (
            MlflowException("busy", error_code=TEMPORARILY_UNAVAILABLE),
            "unreachable",
            "busy Nothing was promoted. It may be over in a while: do it again.",
        ),
    ],
)
def test_what_nobody_foresaw_is_a_refusal_with_a_row(
    client: MlflowClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    reason: str,
    told: str,
) -> None:
    from mlflow_safelock.registry.artifacts import RegistryArtifacts

    version = log_fine_tune("bot")
    register_lock(base_lock())

    def fail(self: RegistryArtifacts, folder: Path, uri: str) -> None:
        raise error

    monkeypatch.setattr(RegistryArtifacts, "publish", fail)
    before = state_of(client, "bot", version)
    with pytest.raises(MlflowException, match=rf"\[{reason}\]") as info:
        stage(client, version)
    assert told in str(info.value)
    assert info.value.get_http_status_code() == 409
    assert state_of(client, "bot", version) == before
    assert ledger_rows(tmp_path)[-1]["reason"] == reason


def test_a_lock_that_is_not_ready_is_none_and_stands_in_the_way_until_revoked(
    client: MlflowClient, tmp_path: Path
) -> None:
    version = log_fine_tune("bot")
    register_lock(base_lock(seed=0))
    register_lock(base_lock(seed=1))
    edit_row(
        tmp_path,
        "UPDATE model_versions SET status='FAILED_REGISTRATION' WHERE name=? AND version=2",
        lock_model_name(BASE),
    )
    with pytest.raises(MlflowException, match="lock_superseded"):
        stage(client, version)
    store_of(client).revoke_lock(lock_model_name(BASE), 2, "never became ready")
    stage(client, version)
    assert ledger_rows(tmp_path)[-1]["lock"]["version"] == 1


def test_forged_tags_have_no_effect(client: MlflowClient) -> None:
    version = log_fine_tune("bot")
    for key in ("state", "lock", "lock_digest", "receipt", "applied_alpha", "base"):
        client.set_model_version_tag("bot", str(version), f"safelock.{key}", "locked")
    with pytest.raises(MlflowException, match="missing_lock"):
        stage(client, version)
    register_lock(base_lock())
    stage(client, version)
    for key in ("state", "lock", "lock_digest", "receipt"):
        client.delete_model_version_tag("bot", str(version), f"safelock.{key}")
    assert loaded_biases()
