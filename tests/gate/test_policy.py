"""A policy decides which promotions are gated, and cannot be misread."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mlflow_safelock.errors import PolicyError
from mlflow_safelock.gate.globs import check_glob, covers
from mlflow_safelock.gate.policy import DEFAULT_POLICY, EvaluationRule, GateRule, Policy
from mlflow_safelock.gate.policy_file import PolicySource, load_policy
from mlflow_safelock.gate.ports import Target
from mlflow_safelock.provenance import Actor, Identity
from tests.keys import write_keys

COMPLETE = """
version: 1
gates:
  - models: "support-*"
    stages: [Staging]
    aliases: [champion]
    lock: {min_version: 2}
    alpha: {default: 5, min: 2.0, max: 8.0}
    carrier: overlay
    missing_lock: allow
    not_an_llm: reject
  - models: "*"
bases:
  "support-*": org/base
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_policy(text: str) -> Path:
        path = tmp_path / "safelock.yaml"
        path.write_text(text)
        return path

    return write_policy


def test_the_default_policy_gates_staging_and_production_of_every_model() -> None:
    rule = DEFAULT_POLICY.rule_for("anything")
    assert rule is not None
    assert rule.covers(Target("stage", "Staging"))
    assert rule.covers(Target("stage", "Production"))
    assert rule.covers(Target("alias", "champion"))
    assert not rule.covers(Target("stage", "Archived"))
    assert not rule.covers(Target("stage", "None"))
    assert not rule.covers(Target("alias", "experiment"))
    assert (rule.alpha.default, rule.alpha.min, rule.alpha.max) == (6.0, 1.0, 12.0)
    assert rule.missing_lock == "reject"


def test_an_alias_is_gated_in_any_case_of_its_letters() -> None:
    rule = DEFAULT_POLICY.rule_for("bot")
    assert rule is not None
    assert rule.covers(Target("alias", "Champion"))


def test_a_file_says_all_of_it_and_the_first_match_decides(write) -> None:
    policy = load_policy(write(COMPLETE))
    support, other = policy.rule_for("support-bot"), policy.rule_for("other")
    assert support is policy.gates[0]
    assert other is policy.gates[1]
    assert support.alpha.default == 5.0
    assert not support.covers(Target("stage", "Production"))
    assert policy.base_of("support-bot") == "org/base"
    assert policy.base_of("other") is None
    assert Policy(version=1, gates=policy.gates[:1]).rule_for("other") is None


def test_globs_are_case_sensitive(write) -> None:
    assert load_policy(write(COMPLETE)).rule_for("Support-bot").lock.min_version == 1


def test_the_digest_is_of_what_the_policy_means_not_of_how_it_is_written(write) -> None:
    spelled = load_policy(write("version: 1\ngates: [{models: '*'}]\n"))
    assert spelled.digest == DEFAULT_POLICY.digest
    assert load_policy(write(COMPLETE)).digest != DEFAULT_POLICY.digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "version: 1\ngates:\n  - modles: '*'\n",
            "line 3: the key gates.0.modles is not known.*: models, ",
        ),
        ("version: 1\nversion: 1\ngates: [{}]\n", "line 2.*twice"),
        ("version: 2\ngates: [{}]\n", "line 1.*version"),
        ("gates: [{}]\n", "line 1: version is missing"),
        ("version: 1\ngates: []\n", "at least one gate"),
        ("version: 1\ngates: [{stages: [staging]}]\n", "stages"),
        ("version: 1\ngates: [{stages: Staging}]\n", "stages must be a list"),
        ("version: 1\ngates: [{alpha: {default: 0, min: 0}}]\n", "0 < min"),
        ("version: 1\ngates: [{alpha: {default: -6, min: -8, max: -1}}]\n", "0 < min"),
        ("version: 1\ngates: [{alpha: {default: 13}}]\n", "0 < min"),
        ("version: 1\ngates: [{alpha: {max: .inf}}]\n", "number"),
        ("version: 1\ngates: [{alpha: {default: .nan}}]\n", "number"),
        ("version: 1\ngates: [{alpha: {default: '6'}}]\n", "valid number"),
        ("version: 1\ngates: [{alpha: {default: yes}}]\n", "valid number"),
        ("version: 1\ngates: [{lock: {min_version: 0}}]\n", "greater than 0"),
        ("version: 1\ngates: [{missing_lock: ignore}]\n", "missing_lock"),
        ("version: 1\ngates: [{lock: {max_age_days: 9999999999}}]\n", "less than or equal to 36525"),
        *(
            (
                f"version: 1\ngates:\n  - {key}: {{{inner}: {number}}}\n",
                f"line 3: gates.0.{key}.{inner}: .*{most}",
            )
            for key, inner, number, most in (
                ("lock", "min_version", 2**53, 2**53 - 1),
                ("evaluation", "min_new_tokens", 2**53, 2**53 - 1),
                ("evaluation", "max_known_prompts", 2**53, 2**53 - 1),
                ("evaluation", "max_age_days", 36526, 36525),
                ("alpha", "max", 10**400, "valid number"),
            )
        ),
        (
            'version: 1\ngates:\n  - {}\n  - evaluation: {system_prompt: "a\\ud800"}\n',
            "line 4: .*half a character",
        ),
        (
            'version: 1\ngates:\n  - {}\n  - signature: {public_keys: ["a\\0"]}\n',
            "line 4: gates.1.signature.public_keys: The key file .* cannot be read",
        ),
        ("version: 1\ngates: [{max_age_days: 3}]\n", "line 2: the key gates.0.max_age_days is not known"),
        (
            "version: 1\ngates:\n  - {}\n  - models: 'a['\n",
            "line 4: gates.1.models: the bracket.*never closed",
        ),
        ("version: 1\ngates:\n  - {}\n  - models: '[z-a]*'\n", "line 4: gates.1.models: the range z-a"),
        ("version: 1\ngates: [{}]\nbases:\n  'x[': org/base\n", r"line 4: bases.*never closed"),
        ("version: 1\ngates:\n  - tags: {risk: 'h['}\n  - {}\n", "line 3: gates.0.tags.risk.*never closed"),
        ("version: 1\ngates:\n  - tags: {risk: 3}\n  - {}\n", "line 3: gates.0.tags.risk.*string"),
        ("version: 1\ngates:\n  - tags: [risk]\n  - {}\n", "line 3: gates.0.tags.*dict"),
        ("version: 1\ngates: [{}]\nunlock: yes\n", "line 3: unlock: must be allow, deny, or names.*'yes'"),
        ("version: 1\ngates: [{}]\nrevoke: [ann]\n", "line 3: revoke: must be allow, deny, or names"),
        ("version: 1\ngates: [{}]\nunlock:\n  by: ann\n", "line 4: unlock.by must be a list"),
        ("version: 1\ngates: [{}]\nunlock: {by: []}\n", "line 3: unlock: by names nobody.*deny"),
        ("version: 1\ngates: [{}]\nunlock: {claimed: deny}\n", "line 3: unlock.by is missing"),
        (
            "version: 1\ngates: [{}]\nother_alpha:\n  by: [ann]\n  calimed: allow\n",
            "line 5: the key other_alpha.calimed is not known; known here: by, claimed",
        ),
        ("version: 1\ngates: [{}]\nunlock: {by: ['team-[']}\n", "line 3: unlock.by.0: the bracket.*never"),
        ("version: 1\ngates: &g [{}]\nbases: *g\n", "aliases"),
        ("version: 1\ngates: [\n", "line"),
        ("", "not a YAML mapping"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_an_error_that_names_the_place(
    write, text: str, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        load_policy(write(text))


ANN, CLAIMED_ANN = Actor(name="ann", verified=True), Actor(name="ann", verified=False)
BOB = Actor(name="team-bob", verified=True)


@pytest.mark.parametrize(
    ("written", "may", "told"),
    [
        ("allow", {ANN, CLAIMED_ANN, BOB}, "anybody"),
        ("deny", set(), "nobody"),
        ("{by: [ann]}", {ANN}, "ann, authenticated"),
        ("{by: [ann], claimed: allow}", {ANN, CLAIMED_ANN}, "ann, authenticated or not"),
        ("{by: [ann, 'team-*']}", {ANN, BOB}, "ann, team-*, authenticated"),
        ("{by: [Ann]}", set(), "Ann, authenticated"),
    ],
)
def test_who_may_override_is_told_by_names_that_are_authenticated(
    write, written: str, may: set[Actor], told: str
) -> None:
    policy = load_policy(write(f"version: 1\ngates: [{{}}]\nunlock: {written}\n"))
    assert {actor for actor in (ANN, CLAIMED_ANN, BOB) if policy.unlock.is_for(actor)} == may
    assert str(policy.unlock) == told
    shown = yaml.safe_dump(policy.model_dump(mode="json"))
    assert load_policy(write(shown)) == policy, "what is shown is a policy, and this one"
    assert (policy.digest == DEFAULT_POLICY.digest) is (written == "allow")


def test_the_environment_names_the_policy_file(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELOCK_POLICY", raising=False)
    assert PolicySource()() == DEFAULT_POLICY
    monkeypatch.setenv("SAFELOCK_POLICY", str(write(COMPLETE)))
    assert PolicySource()().gates[0].models == "support-*"
    monkeypatch.setenv("SAFELOCK_POLICY", "/nowhere/safelock.yaml")
    with pytest.raises(PolicyError, match="cannot be read"):
        PolicySource()()


@pytest.mark.parametrize(
    "gate",
    [
        "lock: {min_version: 10000000000000000000}",
        'evaluation: {system_prompt: "a\\ud800"}',
        'signature: {public_keys: ["a\\0"]}',
        "stages: Staging",
    ],
)
def test_a_file_that_no_policy_can_be_read_from_changes_nothing_and_says_so(
    write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gate: str
) -> None:
    path = write(COMPLETE)
    monkeypatch.setenv("SAFELOCK_POLICY", str(path))
    source = PolicySource()
    before, told = source(), []
    source.when_changed(told.append)
    path.write_text(f"version: 1\ngates: [{{{gate}}}]\n")
    for _ in range(2):
        assert source() is before
        assert isinstance(source.fault, PolicyError)
    assert (caplog.text.count("cannot be used"), told) == (1, [])
    path.write_text("version: 1\ngates: [{models: mended}]\n")
    assert source() == told[0] != before
    assert source.fault is None


def test_the_largest_whole_numbers_of_a_policy_have_a_digest(write) -> None:
    most = 2**53 - 1
    evaluation = f"{{min_new_tokens: {most}, max_known_prompts: {most}, max_age_days: 36525}}"
    lock = f"{{min_version: {most}, max_age_days: 36525}}"
    written = f"version: 1\ngates: [{{lock: {lock}, evaluation: {evaluation}}}]\n"
    assert load_policy(write(written)).digest != DEFAULT_POLICY.digest


def test_nothing_is_a_policy_that_has_no_digest() -> None:
    rule = GateRule(evaluation=EvaluationRule(system_prompt="a\ud800"))
    with pytest.raises(ValueError, match="no canonical JSON, and so no digest"):
        Policy(version=1, gates=(rule,))


def test_who_could_not_be_told_of_a_policy_is_told_when_it_is_asked_for_next(
    write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(COMPLETE)
    monkeypatch.setenv("SAFELOCK_POLICY", str(path))
    source, told, is_down = PolicySource(), [], True

    def put_on_record(policy: Policy) -> None:
        if is_down:
            raise RuntimeError("the database is down")
        told.append(policy.gates[0].models)

    source.when_changed(put_on_record)
    for models in ("second", "the-third"):
        path.write_text(f"version: 1\ngates: [{{models: {models}}}]\n")
        assert source().gates[0].models == models, "it is in force all the same"
    assert "not on record yet" in caplog.text
    is_down = False
    for _ in range(2):
        source()
        assert told == ["second", "the-third"]


class TestGatesByTag:
    POLICY = """
version: 1
gates:
  - models: "support-*"
    tags: {team: support, risk: "high*"}
    lock: {min_version: 2}
    alpha: {default: 8, min: 4}
  - models: "*"
"""

    @pytest.mark.parametrize(
        ("model", "tags", "model_tags", "number"),
        [
            ("support-bot", {"team": "support", "risk": "high-2"}, {}, 1),
            ("support-bot", {"risk": "high"}, {"team": "support"}, 1),
            ("support-bot", {"team": "sales", "risk": "high"}, {"team": "support"}, 1),
            ("support-bot", {"team": "support", "risk": "low"}, {}, 2),
            ("support-bot", {"team": "support", "risk": "High"}, {}, 2),
            ("support-bot", {"team": "support"}, {}, 2),
            ("support-bot", {}, {}, 2),
            ("other", {"team": "support", "risk": "high"}, {}, 2),
        ],
    )
    def test_all_tags_must_match_and_the_registered_models_count_as_well(
        self, write, model: str, tags: dict, model_tags: dict, number: int
    ) -> None:
        policy = load_policy(write(self.POLICY))
        choice = policy.choose(model, tags, model_tags)
        assert choice.number == number
        assert choice.rule is policy.gates[number - 1]
        assert policy.rule_for(model, tags, model_tags) is choice.rule

    def test_the_choice_says_which_tag_did_not_match(self, write) -> None:
        policy = load_policy(write(self.POLICY))
        assert policy.choose("support-bot", {"team": "support", "risk": "low"}).steps == (
            "gate 1: 'support-*' matches 'support-bot', and its tag 'risk' is 'low', not 'high*'.",
            "gate 2: '*' matches 'support-bot', and decides.",
        )
        assert "its tag 'team' is not set" in policy.choose("support-bot", {}).steps[0]

    @pytest.mark.parametrize(
        "judge",
        [
            "models:/judge@gold",
            "models:/judge/Staging",
            "models:/judge/latest",
            "models:/judge",
            "models:/judge/03",
            "models:/judge/\N{ARABIC-INDIC DIGIT THREE}",
            "models://judge/3",
            "models:/judge/3@gold",
            "models:/judge@9f2c1d0ab4e67788",
        ],
    )
    def test_a_judge_is_a_version_as_results_name_it(self, write, judge: str) -> None:
        text = "version: 1\ngates:\n  - evaluation: {judge: JUDGE}\n"
        with pytest.raises(PolicyError, match=r"names no version, or may be another one tomorrow"):
            load_policy(write(text.replace("JUDGE", judge)))
        digest = "@9f2c1d0ab4e67788"
        judges = ("models:/judge/3", "models:/m-0a1b", f"models:/judge/3{digest}", f"models:/m-0a1b{digest}")
        for named in (*judges, f"guard:llama-guard{digest}"):
            load_policy(write(text.replace("JUDGE", f"'{named}'")))

    @pytest.mark.parametrize(
        "judge",
        [
            *("runs:/0a/judge", "file:///srv/judge", "s3://judges/1"),
            *("guard:org/guard@main", "guard:org/guard@9f2c1d0ab4e67788", "guard:./llama-guard"),
            *("classifier:/srv/bert", "score:a/b/c", "guard:llama-guard@9f2c1d0ab4e6"),
        ],
    )
    def test_a_judge_that_no_result_names_so_is_refused(self, judge: str) -> None:
        with pytest.raises(ValidationError, match=r"results name it URI@DIGEST|no name that a result has"):
            EvaluationRule(judge=judge)

    @pytest.mark.parametrize(
        ("wanted", "found", "counts"),
        [
            ("models:/judge/3", "models:/judge/3", True),
            ("models:/judge/3", "models:/judge/3@9f2c1d0ab4e67788", True),
            ("models:/judge/3", "models:/judge/30@9f2c1d0ab4e67788", False),
            ("models:/m-0a1b", "models:/m-0a1b@9f2c1d0ab4e67788", True),
            ("models:/judge/3@9f2c1d0ab4e67788", "models:/judge/3@9f2c1d0ab4e67788", True),
            ("models:/judge/3@9f2c1d0ab4e67788", "models:/judge/3@0123456789abcdef", False),
            ("models:/judge/3@9f2c1d0ab4e67788", "models:/judge/3", False),
            ("guard:org/guard", f"guard:org/guard@{'a' * 40}", True),
            ("classifier:org/bert#toxic", f"classifier:org/bert@{'a' * 40}#toxic", True),
            ("classifier:org/bert#toxic", f"classifier:org/bert@{'a' * 40}#harmful", False),
            ("classifier:org/bert", f"classifier:org/bert@{'a' * 40}#harmful", False),
            (f"guard:org/guard@{'a' * 40}", f"guard:org/guard@{'b' * 40}", False),
            (f"guard:org/guard@{'a' * 40}", "guard:org/guard", False),
            ("guard:guard", "guard:guard@9f2c1d0ab4e67788", False),
            ("guard:guard", f"guard:guard@{'a' * 40}", True),
            ("runs:/0a/judge@9f2c1d0ab4e67788", "runs:/0a/judge@9f2c1d0ab4e67788", True),
            ("runs:/0a/judge@9f2c1d0ab4e67788", "runs:/0a/judge@0123456789abcdef", False),
        ],
    )
    def test_a_judge_counts_by_its_name_and_where_that_is_not_pinned_whatever_was_in_it(
        self, wanted: str, found: str, counts: bool
    ) -> None:
        assert EvaluationRule(judge=wanted).counts_judge(found) is counts

    @pytest.mark.parametrize("models", ["'*'", "'support-*'", "'support-bot*'", "support-bot-2"])
    def test_a_gate_by_tag_needs_one_without_tags_that_a_version_falls_to(self, write, models: str) -> None:
        text = f"version: 1\ngates:\n  - models: {models}\n    tags: {{risk: high}}\n"
        with pytest.raises(PolicyError, match=r"line 4: gates\.0\.tags.*needs a gate without tags after it"):
            load_policy(write(text))
        with pytest.raises(PolicyError, match="needs a gate without tags after it"):
            load_policy(write(text + "  - models: 'sup'\n"))
        load_policy(write(text + f"  - models: {models}\n"))
        load_policy(write(text + "  - {}\n"))

    @pytest.mark.parametrize(
        ("gate", "key"),
        [
            ("stages: [Production]", "stages"),
            ("aliases: []", "aliases"),
            ("alpha: {min: 0.5}", "alpha.min"),
            ("lock: {min_version: 1}", "lock.min_version"),
            ("lock: {min_version: 2}", "lock.max_age_days"),
            ("kinship: {min_cosine: 0.4}", "kinship.min_cosine"),
            ("kinship: {unknown: allow}", "kinship.unknown"),
            ("fingerprint: sampled", "fingerprint"),
            ("tokenizer: ignore", "tokenizer"),
            ("own_biases: ignore", "own_biases"),
            ("missing_lock: allow", "missing_lock"),
            ("not_an_llm: allow", "not_an_llm"),
            ("reads: warn", "reads"),
        ],
    )
    def test_a_tag_never_leads_to_a_looser_gate(self, write, gate: str, key: str) -> None:
        strict = (
            "lock: {min_version: 2, max_age_days: 90, revoked: refuse}, kinship: {unknown: reject}, "
            "fingerprint: full, not_an_llm: reject"
        )
        text = f"version: 1\ngates:\n  - {{tags: {{a: b}}, {gate}}}\n  - {{{strict}}}\n"
        with pytest.raises(PolicyError, match=rf"line 3.*no looser than the gate for '\*'.*{key}"):
            load_policy(write(text))

    def test_the_one_that_a_version_really_falls_to_counts(self, write) -> None:
        text = "version: 1\ngates:\n  - {tags: {a: b}}\n  - {models: 'x*', alpha: {min: 2}}\n  - {}\n"
        with pytest.raises(PolicyError, match=r"'x\*'.*alpha.min"):
            load_policy(write(text))


@pytest.mark.parametrize("glob", ["*", "a?c", "[abc]*", "[!abc]", "[]]", "[]a]x", "[[]", "a]"])
def test_a_sound_glob_stays_as_it_is(glob: str) -> None:
    assert check_glob(glob) == glob


@pytest.mark.parametrize("glob", ["[", "a[b", "[]", "[!]", "[a]["])
def test_an_unclosed_bracket_is_no_glob(glob: str) -> None:
    with pytest.raises(ValueError, match="never closed"):
        check_glob(glob)


@pytest.mark.parametrize(
    ("wide", "narrow", "certainly"),
    [
        ("*", "[ab]?", True),
        ("a*", "ab*", True),
        ("a*", "a?", True),
        ("a*", "a*", True),
        ("ab*", "a*", False),
        ("*b*", "[ab]", False),
        ("a?", "ab", False),
        ("[ab]", "a", False),
    ],
)
def test_one_glob_covers_another_where_that_is_certain(wide: str, narrow: str, certainly: bool) -> None:
    assert covers(wide, narrow) is certainly


class TestSignatures:
    def test_keys_are_read_from_files_beside_the_policy_or_are_in_it(self, write, tmp_path: Path) -> None:
        pem = write_keys(tmp_path).public.read_text()
        by_path = load_policy(write("version: 1\ngates: [{signature: {public_keys: [key.pub.pem]}}]\n"))
        indented = "\n".join(f"          {line}" for line in pem.splitlines())
        inline = load_policy(
            write(f"version: 1\ngates:\n  - signature:\n      public_keys:\n        - |\n{indented}\n")
        )
        assert by_path == inline
        assert by_path.gates[0].signature.keys[0].pem == pem
        assert by_path.digest == inline.digest != DEFAULT_POLICY.digest

    def test_another_key_in_the_file_is_another_policy(self, write, tmp_path: Path) -> None:
        text = "version: 1\ngates: [{signature: {public_keys: [key.pub.pem]}}]\n"
        digests = []
        for _ in range(2):
            write_keys(tmp_path)
            digests.append(load_policy(write(text)).digest)
        assert digests[0] != digests[1]

    @pytest.mark.parametrize(
        ("signature", "message"),
        [
            ("{required: true}", "line 3: gates.0.signature: .*names no key"),
            ("{required: yes}", "line 3: gates.0.signature.required"),
            ("{public_keys: key.pub.pem}", "line 3: .*public_keys must be a list"),
            ("{public_keys: [3]}", "line 3: gates.0.signature.public_keys"),
            (
                "{public_keys: [nowhere.pem]}",
                r"line 3: gates.0.signature.public_keys.*nowhere\.pem cannot be",
            ),
            ("{public_keys: [key.pem]}", "line 3: .*private key, and must be a public one"),
            ("{public_keys: ['-----BEGIN']}", "line 3: .*no public key in PEM"),
            ("{keys: []}", "line 3: the key gates.0.signature.keys is not known"),
        ],
    )
    def test_one_that_cannot_be_meant_is_an_error(
        self, write, tmp_path: Path, signature: str, message: str
    ) -> None:
        write_keys(tmp_path)
        with pytest.raises(PolicyError, match=message):
            load_policy(write(f"version: 1\ngates:\n  - signature: {signature}\n"))

    def test_identities_are_a_name_and_its_provider(self, write) -> None:
        gate = "{required: true, identities: [{identity: a@b.c, issuer: 'https://d.e'}]}"
        rule = load_policy(write(f"version: 1\ngates: [{{signature: {gate}}}]\n")).gates[0].signature
        assert rule.signatories == (Identity(identity="a@b.c", issuer="https://d.e"),)
        assert (rule.keys, rule.required) == ((), True)
        for bad, why in (
            ("{identity: a@b.c}", "issuer"),
            ("{identity: '', issuer: 'https://d.e'}", "identity"),
            ("{identity: a@b.c, issuer: d.e}", "issuer"),
            ("{identity: a@b.c, issuer: 'https://d.e', subject: x}", r"identities\.0\.subject is not known"),
            ("a@b.c", r"identities\.0"),
        ):
            with pytest.raises(PolicyError, match=rf"line 3: .*{why}"):
                load_policy(write(f"version: 1\ngates:\n  - signature: {{identities: [{bad}]}}\n"))

    def test_who_counts_is_part_of_the_policys_digest_and_nobody_is_not(self, write) -> None:
        def digest(signature: str) -> str:
            return load_policy(write(f"version: 1\ngates: [{{signature: {signature}}}]\n")).digest

        one = "{identities: [{identity: a@b.c, issuer: 'https://d.e'}]}"
        assert digest("{identities: []}") == digest("{}") == DEFAULT_POLICY.digest
        assert len({digest(one), digest(one.replace("d.e", "d.f")), DEFAULT_POLICY.digest}) == 3
        # Ledgers and receipts know policies by digests that were made before there were identities.
        assert "identities" not in DEFAULT_POLICY.model_dump_json()

    def test_a_tag_never_leads_to_a_gate_that_takes_other_identities(self, write) -> None:
        def signature(*names: str) -> str:
            identities = ", ".join(f"{{identity: {name}, issuer: 'https://d.e'}}" for name in names)
            return f"signature: {{required: true, identities: [{identities}]}}"

        def text(gate: str, floor: str) -> str:
            return f"version: 1\ngates: [{{tags: {{a: b}}, {gate}}}, {{{floor}}}]\n"

        load_policy(write(text(signature("x"), signature("x", "y"))))
        with pytest.raises(PolicyError, match=r"looser.*signature\.identities"):
            load_policy(write(text(signature("x", "y"), signature("x"))))

    def test_a_tag_never_leads_to_a_gate_that_wants_no_signature(self, write, tmp_path: Path) -> None:
        write_keys(tmp_path)
        write_keys(tmp_path, name="other")
        floor = "{signature: {required: true, public_keys: [key.pub.pem]}}"
        for signature in ("{}", "{required: true, public_keys: [other.pub.pem]}"):
            text = f"version: 1\ngates: [{{tags: {{a: b}}, signature: {signature}}}, {floor}]\n"
            with pytest.raises(PolicyError, match=r"looser.*signature\."):
                load_policy(write(text))


class TestEvaluations:
    """What a policy may ask of evaluations."""

    def test_a_shipped_suite_is_asked_for_by_its_digest(self, write) -> None:
        from mlflow_safelock.evaluate import load_suite

        limits = "{max_harmful_rate: 0.05, max_utility_drop: 0.03}"
        rule = load_policy(write(f"version: 1\ngates: [{{evaluation: {limits}}}]\n")).gates[0]
        assert rule.evaluation is not None
        assert rule.evaluation.suites == ("starter-harmful",), "where none is named"
        assert rule.evaluation.max_utility_drop == 0.03
        assert rule.evaluation.digest_of("starter-harmful") == load_suite("starter-harmful").digest
        other = f"sha256:{'a' * 64}"
        assert rule.evaluation.digest_of(other) == other

    @pytest.mark.parametrize(
        ("evaluation", "fault"),
        [
            ("{suites: []}", "suites"),
            ("{suites: [my-suite]}", "neither a shipped suite"),
            ("{suites: ['sha256:abc']}", "neither a shipped suite"),
            ("{suites: [starter-harmful], max_harmful_rate: 5}", "max_harmful_rate"),
            ("{suites: [starter-harmful], max_age_days: 0}", "max_age_days"),
            ("{suites: [starter-harmful], harm: 0}", "harm"),
            ("{max_utility_drop: -0.1}", "max_utility_drop"),
            ("{max_known_prompts: -1}", "line 2: gates.0.evaluation.max_known_prompts"),
            ("{max_known_prompts: 0.5}", "max_known_prompts"),
            ("{bound: lower}", "line 2: gates.0.evaluation.bound"),
            ("{dtypes: []}", "dtypes"),
            ("{dtypes: float32}", "dtypes"),
            (
                "{safelock_version: newest}",
                "line 2: gates.0.evaluation.safelock_version.*'newest' is no version",
            ),
            ("{safelock_version: ','}", "names no version"),
            ("{safelock_version: 0.2}", "safelock_version"),
        ],
    )
    def test_what_cannot_be_asked_for_is_an_error(self, write, evaluation: str, fault: str) -> None:
        with pytest.raises(PolicyError, match=fault):
            load_policy(write(f"version: 1\ngates: [{{evaluation: {evaluation}}}]\n"))

    @pytest.mark.parametrize(
        ("gate", "key"),
        [
            ("", "evaluation"),
            ("evaluation: {suites: ['sha256:%s'], max_age_days: 9}" % ("a" * 64), "evaluation.suites"),
            ("evaluation: {suites: [starter-harmful]}", "evaluation.max_age_days"),
            ("evaluation: {suites: [starter-harmful], max_harmful_rate: 0.2}", "evaluation.max_harmful_rate"),
            ("evaluation: {suites: [starter-harmful], max_degenerate_rate: 1}", "max_degenerate_rate"),
            ("evaluation: {suites: [starter-harmful], max_utility_drop: 0.2}", "max_utility_drop"),
            ("evaluation: {suites: [starter-harmful], judge: me}", "evaluation.judge"),
            ("evaluation: {suites: [starter-harmful], transform: encoding}", "evaluation.transform"),
            ("evaluation: {suites: [starter-harmful], min_new_tokens: 1}", "evaluation.min_new_tokens"),
            ("evaluation: {suites: [starter-harmful], system_prompt: be good}", "evaluation.system_prompt"),
            ("evaluation: {max_known_prompts: 5}", "evaluation.max_known_prompts"),
            ("evaluation: {max_known_prompts: 4}", "evaluation.bound"),
            ("evaluation: {bound: upper, dtypes: [float32, float16]}", "evaluation.dtypes"),
            ("evaluation: {bound: upper, safelock_version: '>=0.1'}", "evaluation.safelock_version"),
        ],
    )
    def test_a_tag_never_leads_to_a_gate_that_asks_for_less(self, write, gate: str, key: str) -> None:
        floor = (
            "evaluation: {suites: [starter-harmful], max_age_days: 9, max_degenerate_rate: 0.5, "
            "max_over_refusal_rate: 0.1, max_utility_drop: 0.1, max_known_prompts: 4, bound: upper, "
            "dtypes: [float32, bfloat16], safelock_version: '>=0.2'}"
        )
        text = f"version: 1\ngates:\n  - {{tags: {{a: b}}{', ' if gate else ''}{gate}}}\n  - {{{floor}}}\n"
        with pytest.raises(PolicyError, match=rf"no looser than the gate for '\*'.*{key}"):
            load_policy(write(text))

    def test_a_gate_by_tag_may_pin_the_judge_that_the_other_names_and_not_the_other_way_round(
        self, write
    ) -> None:
        gates = "{tags: {a: b}, evaluation: {judge: ONE}}, {evaluation: {judge: TWO}}"
        text = f"version: 1\ngates: [{gates}]\n"
        named, pinned = "'models:/judge/3'", "'models:/judge/3@9f2c1d0ab4e67788'"
        load_policy(write(text.replace("ONE", pinned).replace("TWO", named)))
        with pytest.raises(PolicyError, match=r"looser here: evaluation\.judge"):
            load_policy(write(text.replace("ONE", named).replace("TWO", pinned)))

    def test_a_gate_by_tag_that_asks_for_as_much_is_allowed(self, write) -> None:
        floor = "evaluation: {max_known_prompts: 4, dtypes: [float32, bfloat16], safelock_version: '>=0.2'}"
        tagged = (
            "evaluation: {max_known_prompts: 0, bound: upper, dtypes: [float32], safelock_version: '>=0.2'}"
        )
        load_policy(write(f"version: 1\ngates:\n  - {{tags: {{a: b}}, {tagged}}}\n  - {{{floor}}}\n"))

    @pytest.mark.parametrize(
        ("wanted", "version", "counts"),
        [
            (None, None, True),
            (">=0.2", None, False),
            (">=0.2,<1", "0.2.0", True),
            (">=0.2,<1", "1.0", False),
            (">=0.2", "soon", False),
            (">=0.2", "0.3.dev1", False),
            (">=0.3.dev1", "0.3.dev2", True),
        ],
    )
    def test_a_version_counts_as_its_specifier_says(
        self, wanted: str | None, version: str | None, counts: bool
    ) -> None:
        assert EvaluationRule(safelock_version=wanted).counts(version) is counts

    def test_keys_of_evaluators_are_read_from_beside_the_policy(self, write, tmp_path: Path) -> None:
        keys = write_keys(tmp_path)

        def evaluation(signature: str) -> str:
            return f"evaluation: {{suites: [starter-harmful], signature: {signature}}}"

        signed = evaluation(f"{{required: true, public_keys: [{keys.public.name}]}}")
        rule = load_policy(write(f"version: 1\ngates: [{{{signed}}}]\n")).gates[0].evaluation
        assert [key.pem for key in rule.signature.keys] == [keys.public.read_text()]
        for bad, why in (
            ("{required: true}", "public_keys names no key"),
            ("{public_keys: [gone.pem]}", r"gates\.0\.evaluation\.signature\.public_keys: .*gone\.pem"),
        ):
            with pytest.raises(PolicyError, match=why):
                load_policy(write(f"version: 1\ngates: [{{{evaluation(bad)}}}]\n"))
        loose = f"{{tags: {{a: b}}, {evaluation('{}')}}}"
        with pytest.raises(PolicyError, match=r"looser.*evaluation\.signature\.required"):
            load_policy(write(f"version: 1\ngates: [{loose}, {{{signed}}}]\n"))

    def test_a_tag_may_lead_to_a_gate_that_asks_for_more(self, write) -> None:
        strict = "suites: [starter-harmful, 'sha256:%s'], max_harmful_rate: 0, max_age_days: 3" % ("a" * 64)
        floor = "{evaluation: {suites: [starter-harmful], max_age_days: 9}}"
        load_policy(
            write(f"version: 1\ngates:\n  - {{tags: {{a: b}}, evaluation: {{{strict}}}}}\n  - {floor}\n")
        )
