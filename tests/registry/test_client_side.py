"""``safelock+http``: the gate on the client's side of a stock server, and what it cannot hold back."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import rfc8785
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_safelock.cli.main import main
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from mlflow_safelock.gate import remembered
from mlflow_safelock.registry.artifacts import RegistryArtifacts
from tests.registries import base_lock, biases_of, fine_tune, log_fine_tune, register_lock
from tests.registry.test_guard import store_of
from tests.registry.test_promotion import alias, stage
from tests.servers import MlflowServer, mlflow_server

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    folder = tmp_path_factory.mktemp("stock")
    with mlflow_server(folder, registry_uri=f"sqlite:///{folder}/tracking.db") as running:
        yield running


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    with pytest.MonkeyPatch.context() as patch:  # for all: MLflow keeps the stores that it has opened
        patch.setenv("SAFELOCK_LEDGER", f"sqlite:///{path}")
        yield path


@pytest.fixture
def client(server: MlflowServer, ledger: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    """A client whose registry is the server with the gate before it."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    mlflow.set_tracking_uri(server.url)
    mlflow.set_registry_uri(f"safelock+{server.url}")
    mlflow.set_experiment("tests")
    yield MlflowClient()
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture
def stock(server: MlflowServer) -> MlflowClient:
    return MlflowClient(server.url, server.url)


def loaded_biases(uri: str) -> object:
    return biases_of(mlflow.pyfunc.load_model(uri)._model_impl.pipeline.model)


def safelock(*arguments: str) -> str:
    done = CliRunner().invoke(main, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_promotion_is_refused_or_locks_and_is_served_locked_to_this_client(
    client: MlflowClient, stock: MlflowClient, server: MlflowServer
) -> None:
    version = log_fine_tune("bot", fine_tune(base="org/bot"))
    with pytest.raises(MlflowException, match="missing_lock"):
        stage(client, version)
    assert stock.get_model_version("bot", str(version)).current_stage == "None"
    register_lock(base_lock(base="org/bot"))
    stage(client, version)
    alias(client, version)
    found = stock.get_model_version("bot", str(version))
    assert (found.current_stage, found.aliases) == ("Staging", ["champion"])
    assert found.tags["safelock.base"] == "org/bot", "for people who look at the server"
    for uri in ("models:/bot/Staging", "models:/bot@champion", f"models:/bot/{version}"):
        assert loaded_biases(uri)
    assert "-safelock/" in client.get_model_version_download_uri("bot", str(version))
    unlocked = stock.get_model_version_download_uri("bot", str(version))
    assert "-safelock/" not in unlocked, "a client past it is not held back, as the docs say"
    assert "promoted" in safelock("ledger", "show", "--registry-uri", f"safelock+{server.url}")


def test_what_others_put_into_a_gated_place_is_not_served_to_this_client(
    client: MlflowClient, stock: MlflowClient
) -> None:
    version = log_fine_tune("slipped", fine_tune(base="org/slipped"))
    register_lock(base_lock(base="org/slipped"))
    stage(stock, version, "slipped")
    stock.set_model_version_tag("slipped", str(version), "safelock.state", "locked")
    with pytest.raises(MlflowException, match="not_locked"):
        mlflow.pyfunc.load_model("models:/slipped/Staging")
    stage(client, version, "slipped")
    assert loaded_biases("models:/slipped/Staging")


def test_who_shares_the_ledger_sees_what_was_decided_and_who_has_none_does_not(
    client: MlflowClient, server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = log_fine_tune("shared", fine_tune(base="org/shared"))
    register_lock(base_lock(base="org/shared"))
    stage(client, version, "shared")
    uri = f"safelock+{server.url}"
    assert "-safelock/" in MlflowClient(registry_uri=uri).get_model_version_download_uri(
        "shared", str(version)
    )
    monkeypatch.setenv("SAFELOCK_LEDGER", f"sqlite:///{tmp_path}/another.db")
    mlflow.set_registry_uri(f"{uri}//")
    with pytest.raises(MlflowException, match="not_locked"):
        MlflowClient().get_model_version_download_uri("shared", str(version))


def test_a_number_that_is_none_is_refused_in_the_servers_words(client: MlflowClient) -> None:
    client.create_registered_model("numbered")
    with pytest.raises(MlflowException) as info:
        client.get_model_version_download_uri("numbered", "three")
    assert info.value.get_http_status_code() < 500
    assert info.value.error_code == "INVALID_PARAMETER_VALUE"


def test_a_lock_comes_off_where_it_may_and_the_chain_holds(
    client: MlflowClient, server: MlflowServer
) -> None:
    version = log_fine_tune("undone", fine_tune(base="org/undone"))
    register_lock(base_lock(base="org/undone"))
    stage(client, version, "undone")
    registry = ("--registry-uri", f"safelock+{server.url}", "--tracking-uri", server.url)
    done = CliRunner().invoke(main, ["unlock", f"models:/undone/{version}", "--reason", "test", *registry])
    assert (done.exit_code, "where only locked models are" in done.output) == (1, True)
    client.transition_model_version_stage("undone", str(version), "Archived")
    assert loaded_biases(f"models:/undone/{version}"), "what was locked stays locked"
    safelock("unlock", f"models:/undone/{version}", "--reason", "test", *registry)
    assert not loaded_biases(f"models:/undone/{version}")
    assert client.get_model_version("undone", str(version)).tags == {"safelock.state": "unlocked"}
    assert "The ledger holds" in safelock("ledger", "verify", "--registry-uri", f"safelock+{server.url}")


def test_a_lock_that_was_taken_away_does_not_let_an_older_one_back(
    client: MlflowClient, stock: MlflowClient
) -> None:
    version = log_fine_tune("fresh", fine_tune(base="org/fresh"))
    register_lock(base_lock(base="org/fresh"))
    newest = register_lock(base_lock(seed=1, base="org/fresh"))
    stage(client, version, "fresh")
    stock.delete_model_version(lock_model_name("org/fresh"), str(newest))
    with pytest.raises(MlflowException, match="lock_superseded"):
        alias(client, version, "fresh")


def test_a_lock_that_is_revoked_while_it_is_being_applied_is_not(
    client: MlflowClient, stock: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = log_fine_tune("slow", fine_tune(base="org/slow"))
    register_lock(base_lock(base="org/slow"))
    publish = RegistryArtifacts.publish

    def revoked_meanwhile(self: RegistryArtifacts, folder: Path, uri: str) -> None:
        publish(self, folder, uri)
        store_of(client).revoke_lock(lock_model_name("org/slow"), 1, "leaked")

    monkeypatch.setattr(RegistryArtifacts, "publish", revoked_meanwhile)
    with pytest.raises(MlflowException, match=r"lock_revoked.*leaked"):
        stage(client, version, "slow")
    assert stock.get_model_version("slow", str(version)).current_stage == "None"
    assert "-safelock/" not in client.get_model_version_download_uri("slow", str(version))


def test_without_a_setting_the_ledger_is_this_users_and_one_for_each_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mlflow_safelock.registry.rest import ledger_uri

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SAFELOCK_LEDGER", raising=False)
    addresses = ("https://a.example/mlflow", "https://a-example/mlflow", "https://b.example/mlflow")
    assert len({ledger_uri(address) for address in addresses}) == 3
    with_password = ledger_uri("https://ann:secret@a.example/mlflow/")
    assert with_password == ledger_uri(addresses[0])
    assert with_password.startswith(f"sqlite:///{tmp_path}/.safelock/https---a-example-mlflow-")
    assert (tmp_path / ".safelock").stat().st_mode & 0o777 == 0o700


def test_a_version_of_a_run_is_served_locked(client: MlflowClient, server: MlflowServer) -> None:
    register_lock(base_lock(base="org/run"))
    logged = log_fine_tune("logged", fine_tune(base="org/run"))
    folder = mlflow.artifacts.download_artifacts(f"models:/logged/{logged}")
    with mlflow.start_run() as run:
        client.log_artifacts(run.info.run_id, folder, "model")
    client.create_registered_model("run")
    version = int(
        client.create_model_version("run", f"runs:/{run.info.run_id}/model", run.info.run_id).version
    )
    stage(client, version, "run")
    location = client.get_model_version_download_uri("run", str(version))
    assert "-safelock/" in location
    assert loaded_biases("models:/run/Staging")
    alias(client, version, "run")
    assert client.get_model_version_download_uri("run", str(version)) == location, "nothing was left to do"


def test_what_is_renamed_goes_on_being_served_locked(client: MlflowClient, stock: MlflowClient) -> None:
    version = log_fine_tune("former", fine_tune(base="org/former"))
    register_lock(base_lock(base="org/former"))
    stage(client, version, "former")
    location = client.get_model_version_download_uri("former", str(version))
    client.rename_registered_model("former", "latter")
    assert client.get_model_version_download_uri("latter", str(version)) == location
    assert loaded_biases("models:/latter/Staging")
    stock.rename_registered_model("latter", "last")  # as a renaming that died before it was on record
    with pytest.raises(MlflowException, match="not_locked"):
        client.get_model_version_download_uri("last", str(version))
    client._get_registry_client().store.rename_registered_model("latter", "last")
    assert client.get_model_version_download_uri("last", str(version)) == location


@pytest.mark.parametrize("quotes", ["o'brien", """o'brien's "one\""""])
def test_names_with_quotes_are_gated_and_renamed_as_others(
    client: MlflowClient, stock: MlflowClient, quotes: str
) -> None:
    name, other, base = f"{quotes} bot", f"{quotes} other", f"/home/{quotes}/llama"
    version = log_fine_tune(name, fine_tune(base=base))
    with pytest.raises(MlflowException, match="missing_lock"):
        stage(client, version, name)
    register_lock(base_lock(base=base))
    newest = register_lock(base_lock(base=base, seed=1))
    # By which MLflow's own searches leave out all versions of the model.
    stock.set_model_version_tag(lock_model_name(base), str(newest), "mlflow.prompt.is_prompt", "true")
    stage(client, version, name)
    assert (
        stock.get_model_version(name, str(version)).tags["safelock.lock"]
        == f"models:/{lock_model_name(base)}/{newest}"
    )
    location = client.get_model_version_download_uri(name, str(version))
    client.rename_registered_model(name, other)
    assert client.get_model_version_download_uri(other, str(version)) == location
    assert "-safelock/" in location


def test_deleted_versions_of_a_lock_are_none_at_a_server(client: MlflowClient, stock: MlflowClient) -> None:
    name = lock_model_name("org/gaps")
    locks = [register_lock(base_lock(base="org/gaps", seed=seed)) for seed in range(3)]
    stock.delete_model_version(name, str(locks[1]))
    found = store_of(client).registry.model_versions(name)
    assert [one.version for one in found] == [locks[0], locks[2]]
    assert store_of(client).registry.model_versions("nowhere") == []
    assert store_of(client).registry.newest_version(name) == found[-1]
    stock.delete_model_version(name, str(locks[2]))
    assert store_of(client).registry.newest_version(name) == found[0]
    assert store_of(client).registry.newest_version("nowhere") is None


def reconcile(server: MlflowServer, name: str) -> str:
    """What a companion beside the server's database does, with a ledger in there."""
    registry = ("--registry-uri", f"safelock+{server.registry_uri}", "--tracking-uri", server.url)
    try:
        return safelock("reconcile", "--lock", "--demote", "--model", name, *registry)
    finally:
        mlflow.set_registry_uri(f"safelock+{server.url}")


def test_a_companion_beside_the_server_holds_others_back_and_these_clients_go_on(
    client: MlflowClient, stock: MlflowClient, server: MlflowServer
) -> None:
    register_lock(base_lock(base="org/both"))
    first = log_fine_tune("both", fine_tune(base="org/both"))
    stage(client, first, "both")
    location = client.get_model_version_download_uri("both", str(first))
    assert "locked" in reconcile(server, "both")
    others = stock.get_model_version_download_uri("both", str(first))
    assert "-safelock/" in others, "who goes to the server past the prefix gets it locked, too"
    assert others != location
    assert client.get_model_version_download_uri("both", str(first)) == location
    assert loaded_biases("models:/both/Staging")
    alias(client, first, "both")
    # One that others put there, and that the companion locked first.
    second = log_fine_tune("both", fine_tune(base="org/both"))
    stage(stock, second, "both")
    reconcile(server, "both")
    with pytest.raises(MlflowException, match="not_locked"):
        client.get_model_version_download_uri("both", str(second))
    stage(client, second, "both")
    location = client.get_model_version_download_uri("both", str(second))
    for _ in range(2):
        reconcile(server, "both")
        stage(client, second, "both")
        assert client.get_model_version_download_uri("both", str(second)) == location
    assert loaded_biases(f"models:/both/{second}")


def test_an_overlay_that_somebody_made_is_never_served_nor_taken_for_another_fine_tunes(
    client: MlflowClient, stock: MlflowClient, server: MlflowServer, tmp_path: Path
) -> None:
    register_lock(base_lock(base="org/forged"))
    version = log_fine_tune("forged", fine_tune(base="org/forged"))
    stage(client, version, "forged")
    overlay = Path(mlflow.artifacts.download_artifacts(f"models:/forged/{version}", dst_path=str(tmp_path)))
    receipt = json.loads((overlay / "receipt.json").read_text())
    receipt["predicate"]["alpha"] = 0.001
    (overlay / "receipt.json").write_bytes(rfc8785.dumps(receipt))
    made = log_fine_tune("weak", fine_tune(base="org/forged"))
    weak = put_beside(server, stock, "weak", made, overlay)
    with pytest.raises(MlflowException, match=r"unreadable.*it lies beside the one at"):
        stage(client, made, "weak")
    location = put_beside(server, stock, "forged", version, overlay)
    point_at(server, "weak", made, location)
    stage(client, made, "weak")
    served = client.get_model_version_download_uri("weak", str(made))
    assert served not in (weak, location)
    assert client.get_model_version("weak", str(made)).tags["safelock.applied_alpha"] == "6"
    assert loaded_biases(f"models:/weak/{made}")
    (overlay / "MLmodel").write_text("flavors: {}")
    damaged = log_fine_tune("weak", fine_tune(base="org/forged"))
    put_beside(server, stock, "weak", damaged, overlay)
    with pytest.raises(MlflowException, match=r"unreadable.*'MLmodel'"):
        stage(client, damaged, "weak")
    point_at(server, "weak", damaged, location)
    original = server.artifacts / location.removeprefix("mlflow-artifacts:/").partition("-safelock/")[0]
    (original / "requirements.txt").write_text("other")
    with pytest.raises(MlflowException, match=r"unreadable.*'requirements\.txt'"):
        stage(client, damaged, "weak")


def put_beside(server: MlflowServer, stock: MlflowClient, name: str, version: int, folder: Path) -> str:
    """Put a folder where a gate would have written a locked model of a version, which then serves it."""
    original = stock.get_model_version_download_uri(name, str(version))
    location = f"{original}-safelock/{'1' * 32}"
    shutil.copytree(folder, server.artifacts / location.removeprefix("mlflow-artifacts:/"))
    point_at(server, name, version, location)
    return location


def point_at(server: MlflowServer, name: str, version: int, location: str) -> None:
    """Have a version handed out from elsewhere."""
    with sqlite3.connect(server.registry_uri.removeprefix("sqlite:///")) as database:
        change = "UPDATE model_versions SET storage_location = ? WHERE name = ? AND version = ?"
        assert database.execute(change, (location, name, version)).rowcount == 1


def test_users_with_ledgers_of_their_own_prepare_standalone_models_each_for_themselves(
    client: MlflowClient, server: MlflowServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "safelock.yaml").write_text("version: 1\ngates:\n  - carrier: standalone\n")
    monkeypatch.setenv("SAFELOCK_POLICY", str(tmp_path / "safelock.yaml"))
    register_lock(base_lock(base="org/whole"))
    version = log_fine_tune("whole", fine_tune(base="org/whole"))
    served: dict[str, str] = {}
    users: dict[str, MlflowClient] = {}
    for slashes, user in enumerate(("ann", "bob"), start=3):
        monkeypatch.setenv("SAFELOCK_LEDGER", f"sqlite:///{tmp_path}/{user}.db")
        uri = f"safelock+{server.url}{'/' * slashes}"
        users[user] = MlflowClient(registry_uri=uri)
        with pytest.raises(MlflowException, match="not_prepared"):
            stage(users[user], version, "whole")
        safelock("prepare", f"models:/whole/{version}", "--registry-uri", uri, "--tracking-uri", server.url)
        stage(users[user], version, "whole")
        served[user] = users[user].get_model_version_download_uri("whole", str(version))
    assert len(set(served.values())) == 2
    remembered._held_until.clear()  # as in a minute
    for user, there in users.items():
        assert there.get_model_version_download_uri("whole", str(version)) == served[user]
        stage(there, version, "whole")
    loaded = mlflow.transformers.load_model(served["ann"])
    assert biases_of(loaded.model)
