"""The demo's MLflow: a tracking database, a gated registry, and what is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from mlflow_safelock.demo.surroundings import sqlite_uri
from mlflow_safelock.demo.toy_model import MAX_NEW_TOKENS
from mlflow_safelock.errors import PromotionRefused, RecipeError
from mlflow_safelock.flavors import meta_safetylock

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mlflow_safelock.lock import SafetyLock

BASE_MODEL = "safelock-demo/toy-base"
"""Identity of the toy's base model."""

MODEL_NAME = "toy-bot"
"""Registered name of the fine-tune."""

STAGING_URI = f"models:/{MODEL_NAME}/Staging"
EXPERIMENT = "safelock-demo"
REQUIREMENTS = ("mlflow", "torch", "transformers")
"""Given, because MLflow would look for torchvision, which text generation does not need."""


class Shelf:
    """Where the demo keeps its models.

    Attributes:
        folder: The folder of everything.
        tracking_uri: MLflow's tracking database.
        registry_uri: Its registry, behind the gate.
        policy_file: The gate's policy.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.tracking_uri = sqlite_uri(self.folder / "tracking.db")
        self.registry_uri = f"safelock+{sqlite_uri(self.folder / 'registry.db')}"
        self.policy_file = self.folder / "safelock.yaml"

    def write_policy(self, alpha: float) -> None:
        """Write the gate's policy: which base the model comes from, and how strong its lock shall be."""
        policy = {
            "version": 1,
            "gates": [
                {
                    "models": "toy-*",
                    "stages": ["Staging", "Production"],
                    "aliases": ["staging", "champion"],
                    "alpha": {"default": alpha, "min": min(alpha, 1.0), "max": max(alpha, 12.0)},
                    "missing_lock": "reject",
                }
            ],
            "bases": {"toy-*": BASE_MODEL},
        }
        self.policy_file.write_text(yaml.safe_dump(policy, sort_keys=False), encoding="utf-8")

    def log_fine_tune(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[str]
    ) -> str:
        """Log and register the fine-tune with ``mlflow.transformers``; the version's number.

        Args:
            model: The fine-tune.
            tokenizer: Its tokenizer.
            chats: Rendered prompts, as an input example.
        """
        artifacts = (self.folder / "artifacts").as_uri()
        client = MlflowClient()
        experiment = client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "include_prompt": False}
        with mlflow.start_run(experiment_id=experiment, run_name="fine-tune"):
            info = mlflow.transformers.log_model(
                {"model": model, "tokenizer": tokenizer},
                name="model",
                task="text-generation",
                registered_model_name=MODEL_NAME,
                pip_requirements=list(REQUIREMENTS),
                signature=infer_signature(list(chats), ["an answer"]),
                model_config=options,
            )
        return str(info.registered_model_version)

    def register_lock(self, lock: SafetyLock) -> str:
        """Register the lock where the gate looks; the registered model's name."""
        experiment = MlflowClient().get_experiment_by_name(EXPERIMENT)
        name = meta_safetylock.lock_model_name(lock.base_model)
        with mlflow.start_run(experiment_id=experiment.experiment_id, run_name="lock"):
            meta_safetylock.log_model(lock, registered_model_name=name)
        return name

    def promote(self, version: str) -> None:
        """Move the fine-tune to Staging, as anybody does with plain MLflow.

        Raises:
            PromotionRefused: The gate said no.
        """
        try:
            MlflowClient().transition_model_version_stage(MODEL_NAME, version, "Staging")
        except MlflowException as error:
            raise PromotionRefused("refused", str(error)) from error

    def refusal_without_lock(self, version: str) -> str:
        """Try to promote while no lock is registered; what the gate says.

        Raises:
            RecipeError: The gate let it through.
        """
        try:
            self.promote(version)
        except PromotionRefused as refused:
            return refused.cause
        raise RecipeError(
            "The gate promoted a fine-tune that has no lock.",
            next_step="Another package may serve this registry: see which store MLflow loads.",
        )

    def staged(self) -> Any:
        """What every consumer of the registry gets for the model in Staging."""
        return mlflow.pyfunc.load_model(STAGING_URI)
