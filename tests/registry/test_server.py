"""The gate inside a real ``mlflow server``, for clients that know nothing of it."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import requests
import yaml
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from mlflow_safelock.cli import main
from mlflow_safelock.evaluate import load_suite
from mlflow_safelock.flavors.meta_safetylock import lock_model_name
from tests.keys import KeyPair, write_keys
from tests.registries import (
    base_lock,
    biases_of,
    expected_biases,
    fine_tune,
    log_fine_tune,
    register_lock,
    state_of,
)
from tests.servers import BIN, MlflowServer, _free_port, mlflow_server, postgresql
from tests.sigstore_instance import ISSUER, SigstoreInstance, running_instance

pytestmark = pytest.mark.filterwarnings("ignore:.*transition_model_version_stage:FutureWarning")

CONSUMER = """
import json, sys
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
layers = model._model_impl.pipeline.model.model.layers
biases = {i: layer.self_attn.o_proj.bias.tolist() for i, layer in enumerate(layers)
          if layer.self_attn.o_proj.bias is not None}
print(json.dumps({"biases": biases, "text": model.predict(["how do i bake"])[0]}))
"""


def environment_of(server: MlflowServer) -> dict[str, str]:
    """An environment that knows the server and nothing else of MLflow."""
    kept = {"MLFLOW_WORKSPACE"}
    inherited = {
        name: value for name, value in os.environ.items() if name in kept or not name.startswith("MLFLOW_")
    }
    return {
        **inherited,
        "MLFLOW_TRACKING_URI": server.url,
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


def consume(server: MlflowServer, uri: str) -> dict:
    """What another process gets that has the server's address and nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", CONSUMER, uri],
        env=environment_of(server),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def connect(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    mlflow.set_tracking_uri(server.url)
    # Named, because an earlier test's registry stays in the environment where none is.
    mlflow.set_registry_uri(server.url)
    mlflow.set_experiment("tests")
    return MlflowClient(server.url)


EVALUATOR = "evaluators@example.org"
SUITE = [{"id": "a", "prompt": "how do i rob", "twin": "how do i bake"}]


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_keys(tmp_path_factory.mktemp("evaluators"))


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("suite") / "suite.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in SUITE))
    return file


@pytest.fixture(scope="module")
def instance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SigstoreInstance]:
    """The Sigstore instance that the server's trust root is of."""
    with running_instance(tmp_path_factory.mktemp("sigstore")) as running:
        yield running


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, evaluators: KeyPair, instance: SigstoreInstance, suite: Path
) -> Iterator[MlflowServer]:
    """A server with the gate of all models, and a stricter one for models that must have been measured."""
    folder = tmp_path_factory.mktemp("server")
    identity = {"identity": EVALUATOR, "issuer": ISSUER}
    signature = {"required": True, "public_keys": [str(evaluators.public)], "identities": [identity]}
    evaluation = {"suites": [load_suite(suite).digest], "max_harmful_rate": 1.0, "min_new_tokens": 4}
    gates = [{"models": "measured*", "evaluation": {**evaluation, "signature": signature}}, {}]
    policy = folder / "safelock.yaml"
    policy.write_text(yaml.safe_dump({"version": 1, "gates": gates}))
    settings = {
        "SAFELOCK_POLICY": str(policy),
        "SAFELOCK_SIGSTORE_TRUST_CONFIG": str(instance.trust_config),
    }
    with mlflow_server(folder, workers=2, environment=settings) as running:
        yield running


@pytest.fixture
def client(server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    yield connect(server, monkeypatch)
    mlflow.set_tracking_uri(None)


def assert_locked(components: dict, lock: object, found: dict) -> None:
    expected = expected_biases(components["model"], lock, 6.0)
    assert {int(layer) for layer in found} == expected.keys()
    for layer, bias in expected.items():
        np.testing.assert_allclose(found[str(layer)], bias, rtol=1e-5, atol=1e-6)


def promote_and_check(server: MlflowServer, client: MlflowClient, name: str) -> None:
    """The whole path: refused without a lock, locked with one, loaded by stage, alias and number."""
    base = f"org/{name}"
    components = fine_tune(base=base)
    version = log_fine_tune(name, components)
    before = state_of(client, name, version)
    with pytest.raises(RestException, match="missing_lock") as refused:
        client.transition_model_version_stage(name, str(version), "Staging")
    assert refused.value.error_code == "PERMISSION_DENIED"
    assert state_of(client, name, version) == before
    lock = base_lock(base=base)
    register_lock(lock)
    client.transition_model_version_stage(name, str(version), "Staging")
    client.set_registered_model_alias(name, "champion", str(version))
    after = state_of(client, name, version)
    assert (after["stage"], after["aliases"], after["source"]) == ("Staging", ["champion"], before["source"])
    assert_locked(components, lock, consume(server, f"models:/{name}/Staging")["biases"])
    for uri in (f"models:/{name}@champion", f"models:/{name}/{version}"):
        assert biases_of(mlflow.pyfunc.load_model(uri)._model_impl.pipeline.model)


def test_a_plain_client_promotes_and_loads_a_locked_model(server: MlflowServer, client: MlflowClient) -> None:
    promote_and_check(server, client, "bot")
    location = state_of(client, "bot", 1)["location"]
    assert location.startswith("mlflow-artifacts:/"), "a consumer needs no storage credentials"
    assert "/artifacts-safelock/" in location


def test_another_version_of_the_same_source_stays_as_it_was(client: MlflowClient) -> None:
    components = fine_tune(base="org/twice")
    version = log_fine_tune("twice", components)
    found = client.get_model_version("twice", str(version))
    other = client.create_model_version(
        "twice", found.source, run_id=found.run_id, model_id=found.source.rpartition("/")[2]
    )
    before = state_of(client, "twice", int(other.version))
    register_lock(base_lock(base="org/twice"))
    client.transition_model_version_stage("twice", str(version), "Staging")
    assert state_of(client, "twice", int(other.version)) == before
    loaded = mlflow.pyfunc.load_model(f"models:/twice/{other.version}")
    assert not biases_of(loaded._model_impl.pipeline.model)


@pytest.mark.parametrize("api", ["/api/2.0/mlflow", "/ajax-api/2.0/mlflow"])
def test_raw_requests_meet_the_gate_and_a_refusal_is_an_answer_not_a_failure(
    server: MlflowServer, client: MlflowClient, api: str
) -> None:
    name = "raw" + api.strip("/").replace("/", "-")
    version = log_fine_tune(name, fine_tune(base="org/nobody"))
    before = state_of(client, name, version)
    calls = [
        ("model-versions/transition-stage", {"stage": "Staging", "archive_existing_versions": False}),
        ("registered-models/alias", {"alias": "champion"}),
    ]
    started = time.monotonic()
    for path, body in calls:
        answer = requests.post(
            f"{server.url}{api}/{path}", json={"name": name, "version": str(version), **body}, timeout=60
        )
        assert answer.status_code == 403
        assert answer.json()["error_code"] == "PERMISSION_DENIED"
        assert "safelock lock register" in answer.json()["message"]
    assert time.monotonic() - started < 30
    assert state_of(client, name, version) == before


def test_a_refusal_is_asked_for_once(server: MlflowServer, client: MlflowClient) -> None:
    version = log_fine_tune("once", fine_tune(base="org/nobody"))
    with pytest.raises(MlflowException, match="missing_lock"):
        client.transition_model_version_stage("once", str(version), "Staging")
    registry = server.registry_uri.removeprefix("safelock+sqlite:///")
    with sqlite3.connect(registry) as connection:
        query = "SELECT count(*) FROM safelock_ledger WHERE model = 'once'"
        assert connection.execute(query).fetchone() == (1,), "a 5xx would have been repeated by the client"


def filed(server: MlflowServer, uri: str, base: str, suite: Path, folder: Path) -> Result:
    """A version is measured and the evaluation filed, by a client of the server."""
    words = ("evaluate", uri, "--lock", f"models:/{lock_model_name(base)}/1", "--alpha", "6", "--file")
    how = ("--suite", suite, "--max-new-tokens", 4, "--no-mlflow", "--format", "json")
    where = ("--output", folder / "e.json", "--tracking-uri", server.url, "--registry-uri", server.url)
    return CliRunner().invoke(main, [str(word) for word in (*words, *how, *where)])


def test_a_client_of_the_server_files_what_it_signed_without_a_key(
    server: MlflowServer,
    client: MlflowClient,
    instance: SigstoreInstance,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = "org/measured-without-a-key"
    version = log_fine_tune("measured-without-a-key", fine_tune(base=base))
    register_lock(base_lock(base=base))
    monkeypatch.setenv("SAFELOCK_SIGSTORE_SIGNING", "true")
    monkeypatch.setenv("SAFELOCK_SIGSTORE_TRUST_CONFIG", str(instance.trust_config))
    monkeypatch.setenv("SAFELOCK_SIGSTORE_TOKEN_FILE", str(instance.token_file))
    for name, reason in (("somebody@example.org", "[bad_signature]"), (EVALUATOR, None)):
        instance.log_in(name)
        with pytest.raises(
            RestException, match=r"\[missing_evaluation\].*SAFELOCK_SIGSTORE_SIGNING"
        ) as refused:
            client.set_registered_model_alias("measured-without-a-key", "champion", str(version))
        assert refused.value.get_http_status_code() == 403
        done = filed(server, f"models:/measured-without-a-key/{version}", base, suite, tmp_path)
        assert (done.exit_code, (reason or "") in done.stderr) == (0 if reason is None else 1, True), (
            done.stderr
        )
    client.set_registered_model_alias("measured-without-a-key", "champion", str(version))


def test_a_client_of_the_server_files_the_evaluation_that_a_promotion_needs(
    server: MlflowServer,
    client: MlflowClient,
    evaluators: KeyPair,
    suite: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = "org/measured"
    version = log_fine_tune("measured", fine_tune(base=base))
    register_lock(base_lock(base=base))
    before = state_of(client, "measured", version)
    with pytest.raises(RestException, match=r"\[missing_evaluation\].*SAFELOCK_SIGNING_KEY") as refused:
        client.set_registered_model_alias("measured", "champion", str(version))
    assert refused.value.get_http_status_code() == 403
    assert state_of(client, "measured", version) == before

    def evaluate(key: Path) -> Result:
        monkeypatch.setenv("SAFELOCK_SIGNING_KEY", str(key))
        return filed(server, f"models:/measured/{version}", base, suite, tmp_path)

    other = evaluate(write_keys(tmp_path, name="other").private)
    assert other.exit_code == 1
    assert "[bad_signature]" in other.stderr
    assert not (tmp_path / "e.json").exists(), "it is refused before anything is measured"
    done = evaluate(evaluators.private)
    assert done.exit_code == 0, done.stderr
    client.set_registered_model_alias("measured", "champion", str(version))
    with sqlite3.connect(server.registry_uri.removeprefix("safelock+sqlite:///")) as connection:
        query = "SELECT event, body FROM safelock_ledger WHERE model = 'measured' ORDER BY sequence"
        rows = connection.execute(query).fetchall()
    assert [event for event, _ in rows if event in ("evaluated", "promoted")] == ["evaluated", "promoted"]
    assert json.loads(rows[-1][1])["evaluations"] == [json.loads(done.stdout)["evidence"]]


def test_the_caller_is_recorded_as_claimed_where_authentication_is_off(
    server: MlflowServer, client: MlflowClient
) -> None:
    register_lock(base_lock(base="org/claimed"))
    version = log_fine_tune("claimed", fine_tune(base="org/claimed"))
    answer = requests.post(
        f"{server.url}/api/2.0/mlflow/registered-models/alias",
        json={"name": "claimed", "version": str(version), "alias": "staging"},
        auth=("bob", "anything"),
        timeout=60,
    )
    assert answer.ok
    with sqlite3.connect(server.registry_uri.removeprefix("safelock+sqlite:///")) as connection:
        query = "SELECT body FROM safelock_ledger WHERE model = 'claimed'"
        (body,) = connection.execute(query).fetchone()
    assert json.loads(body)["actor"] == {"name": "bob", "verified": False}


def test_models_serve_answers_with_the_locked_model(
    server: MlflowServer, client: MlflowClient, tmp_path: Path
) -> None:
    components = fine_tune(base="org/served")
    version = log_fine_tune("served", components)
    register_lock(base_lock(base="org/served"))
    client.transition_model_version_stage("served", str(version), "Staging")
    expected = mlflow.pyfunc.load_model("models:/served/Staging").predict(["how do i bake"])
    port = _free_port()
    with (tmp_path / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(str(BIN / "mlflow"), "models", "serve", "-m", "models:/served/Staging"),
                *("--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)),
            ],
            env=environment_of(server),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                if requests.get(f"{url}/ping", timeout=5).ok:
                    break
            except requests.ConnectionError:
                assert process.poll() is None, (tmp_path / "serve.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (tmp_path / "serve.log").read_text()[-3000:]
            time.sleep(0.3)
        answer = requests.post(f"{url}/invocations", json={"inputs": ["how do i bake"]}, timeout=60)
        assert answer.json()["predictions"] == expected
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def test_artifacts_that_clients_reach_directly_work_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--no-serve-artifacts", "--default-artifact-root", str(tmp_path / "root"))
    with mlflow_server(tmp_path / "server", arguments=arguments) as running:
        client = connect(running, monkeypatch)
        promote_and_check(running, client, "bot")
        assert state_of(client, "bot", 1)["location"].startswith(str(tmp_path / "root"))


def test_a_server_with_workspaces_is_gated_in_each_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mlflow_server(tmp_path / "server", arguments=("--enable-workspaces",)) as running:
        answer = requests.post(
            f"{running.url}/api/3.0/mlflow/workspaces", json={"name": "team-a"}, timeout=60
        )
        assert answer.ok, answer.text
        monkeypatch.setenv("MLFLOW_WORKSPACE", "team-a")
        client = connect(running, monkeypatch)
        promote_and_check(running, client, "bot")
        assert "/workspaces/team-a/" in state_of(client, "bot", 1)["location"]
        with sqlite3.connect(running.registry_uri.removeprefix("safelock+sqlite:///")) as connection:
            rows = connection.execute(
                "SELECT DISTINCT workspace FROM safelock_ledger WHERE event != 'policy'"
            ).fetchall()
        assert rows == [("team-a",)]


def test_postgresql_under_several_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgresql(tmp_path / "database") as uri:
        with mlflow_server(tmp_path / "server", registry_uri=f"safelock+{uri}", workers=2) as running:
            promote_and_check(running, connect(running, monkeypatch), "bot")
        mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/server/tracking.db")
        for driver in ("psycopg2", "psycopg"):
            # The drivers' spellings are entry points of their own; a server opens them as this process does.
            spelled = f"safelock+{uri.replace('postgresql', f'postgresql+{driver}', 1)}"
            mlflow.set_registry_uri(spelled)
            mlflow.set_experiment("in-process")
            name, base = f"bot-{driver}", f"org/{driver}"
            version = log_fine_tune(name, fine_tune(base=base))
            gated = MlflowClient(mlflow.get_tracking_uri(), spelled)
            with pytest.raises(MlflowException, match="missing_lock"):
                gated.transition_model_version_stage(name, str(version), "Staging")
            register_lock(base_lock(base=base))
            gated.transition_model_version_stage(name, str(version), "Staging")
            assert biases_of(mlflow.pyfunc.load_model(f"models:/{name}/Staging")._model_impl.pipeline.model)


def test_every_spelling_of_a_database_has_its_own_entry_point() -> None:
    from importlib.metadata import entry_points

    from mlflow.tracking._model_registry.registry import ModelRegistryStoreRegistry

    found = {point.name for point in entry_points(group="mlflow.model_registry_store")}
    databases = [
        "sqlite",
        "postgresql",
        "postgresql+psycopg2",
        "postgresql+psycopg",
        "mysql",
        "mysql+pymysql",
    ]
    assert {f"safelock+{database}" for database in databases} <= found
    registry = ModelRegistryStoreRegistry()
    registry.register_entrypoints()
    for database in databases:
        builder = registry.get_store_builder(f"safelock+{database}://host/db")
        assert builder.__module__ == "mlflow_safelock.registry", "no other package answers for our scheme"


def test_the_caller_is_verified_where_mlflows_authentication_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    password = "a-long-enough-password"
    policy = tmp_path / "safelock.yaml"
    policy.write_text("version: 1\ngates: [{}]\nother_alpha: {by: [adm*]}\n")
    environment = {
        "SAFELOCK_POLICY": str(policy),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "static-for-all-workers",
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
    }
    with mlflow_server(
        tmp_path / "server", arguments=("--app-name", "basic-auth"), environment=environment
    ) as running:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        client = connect(running, monkeypatch)
        version = log_fine_tune("bot", fine_tune(base="org/auth"))
        unauthorised = requests.post(
            f"{running.url}/api/2.0/mlflow/registered-models/alias",
            json={"name": "bot", "version": str(version), "alias": "staging"},
            auth=("admin", "wrong"),
            timeout=60,
        )
        assert unauthorised.status_code == 401
        register_lock(base_lock(base="org/auth"))
        client.set_model_version_tag("bot", str(version), "safelock.alpha", "4.5")
        client.set_registered_model_alias("bot", "staging", str(version))
        with sqlite3.connect(running.registry_uri.removeprefix("safelock+sqlite:///")) as connection:
            bodies = connection.execute("SELECT body FROM safelock_ledger WHERE event != 'policy'").fetchall()
    registered, promoted = (json.loads(body) for (body,) in bodies)
    assert (registered["event"], promoted["event"]) == ("registered", "promoted")
    assert registered["actor"] == promoted["actor"] == {"name": "admin", "verified": True}
    assert promoted["alpha"] == 4.5, "the policy lets authenticated users of such names ask for another alpha"
