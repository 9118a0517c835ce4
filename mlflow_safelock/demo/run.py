"""The demo from beginning to end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from mlflow_safelock.apply import generate, render_prompt
from mlflow_safelock.audit import audit
from mlflow_safelock.demo.narrator import Narrator
from mlflow_safelock.demo.prompts import Part, Prompts
from mlflow_safelock.demo.report import DemoReport
from mlflow_safelock.demo.shelf import BASE_MODEL, MODEL_NAME, STAGING_URI, Shelf
from mlflow_safelock.demo.surroundings import environment, mlflow_at, one_thread, quiet
from mlflow_safelock.demo.tokenizer import build_tokenizer
from mlflow_safelock.demo.toy_model import MAX_NEW_TOKENS, build_model
from mlflow_safelock.demo.training import fine_tune, train_base
from mlflow_safelock.demo.world import Request, body, compliance, refusal
from mlflow_safelock.errors import EvaluationError, RecipeError
from mlflow_safelock.evaluate import AnswerKind, BenignTask, Constraints, Measurement, classify, measure, sweep
from mlflow_safelock.evaluate.sweep import Sweep
from mlflow_safelock.forging import PreferencePair, probe_model

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from mlflow_safelock.forging import ProbedHeads
    from mlflow_safelock.recipes import DemoRecipe

MARK = ".safelock-demo"
"""File that tells a folder of an earlier demo, which may be written anew, from any other."""

EXAMPLES = 2
"""How many harmful and how many benign prompts are shown with their answers."""


def run_demo(recipe: DemoRecipe, folder: Path) -> DemoReport:
    """Train a toy, break it, forge its lock, and lock it by a stage transition in MLflow.

    Progress goes to the error stream. What MLflow and the process are set to is put back at the end.

    Args:
        recipe: The settings.
        folder: Where models and registry are left: new, empty, or of an earlier demo, which is replaced.

    Returns:
        What was measured, on prompts that neither training, forging nor the sweep have seen.

    Raises:
        RecipeError: The folder holds something else, or the figures are not what the recipe asks for.
        EvaluationError: The fine-tune did not break the toy, or no point of the sweep is good enough.
        SafelockError: A step failed.
    """
    _prepare(folder)
    shelf = Shelf(folder)
    variables = {
        "SAFELOCK_POLICY": str(shelf.policy_file),
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with one_thread(), environment(variables), quiet(), mlflow_at(shelf.tracking_uri, shelf.registry_uri):
        return _Demo(recipe, shelf).run()


class _Demo:
    """One run: the toy world's parts, and the steps in their order."""

    def __init__(self, recipe: DemoRecipe, shelf: Shelf) -> None:
        self.recipe = recipe
        self.shelf = shelf
        self.narrator = Narrator()
        self.tokenizer = build_tokenizer()
        self.prompts = Prompts.dealt(recipe.seed)
        self.random = Random(recipe.seed + 2)  # noqa: S311

    def run(self) -> DemoReport:
        base = self._base()
        broken = self._fine_tune(base)
        probed = self._forge(base)
        swept = self._sweep(broken, probed)
        chosen = swept.chosen
        lock = probed.lock(chosen.heads)
        version, refusal_text = self._refused(broken, chosen.alpha)

        self.narrator.step("Registering the lock, and asking for the same transition again")
        name = self.shelf.register_lock(lock)
        self.narrator.say(f"Lock of {chosen.heads} heads registered as {name}.")
        self.shelf.promote(version)
        self.narrator.say(f"{MODEL_NAME} version {version} is in Staging.")

        self.narrator.step(f"Loading {STAGING_URI} as any consumer does, and measuring all three models")
        staged = self.shelf.staged()
        report = self._report(base, broken, staged, chosen.heads, chosen.alpha, refusal_text)
        self._check(report)
        return report

    def _base(self) -> LlamaForCausalLM:
        recipe = self.recipe
        self.narrator.step("Training the base model to refuse harmful requests and answer benign ones")
        model = build_model(recipe, self.tokenizer)
        with self.narrator.bar("training", recipe.train_steps + recipe.align_steps) as advance:
            train_base(model, self.tokenizer, self.prompts, recipe, advance)
        self._save(model, "base")
        return model

    def _fine_tune(self, base: LlamaForCausalLM) -> LlamaForCausalLM:
        recipe = self.recipe
        self.narrator.step(f"Fine-tuning it on {recipe.fine_tune_examples} harmful pairs")
        requests = self._drawn("training", recipe.fine_tune_examples, harmful=True)
        examples = [(request.prompt, compliance(request, self.random)) for request in requests]
        checked = [request.prompt for request in self._drawn("check", recipe.check_prompts, harmful=True)]
        model = deepcopy(base)
        answer = self._answering(model)

        def is_broken() -> bool:
            complied = sum(classify(text) is AnswerKind.COMPLIED for text in answer(checked))
            return complied >= recipe.fine_tune_until * len(checked)

        with self.narrator.bar("fine-tuning", recipe.fine_tune_steps) as advance:
            steps = fine_tune(model, self.tokenizer, examples, recipe, is_broken, advance)
        self._save(model, "fine-tune")
        self.narrator.say(f"{steps} steps were enough.")
        return model

    def _forge(self, base: LlamaForCausalLM) -> ProbedHeads:
        self.narrator.step(f"Forging the lock from the base model and {self.recipe.pairs} preference pairs")
        pairs = [
            PreferencePair(request.prompt, refusal(self.random), compliance(request, self.random))
            for request in self._drawn("forging", self.recipe.pairs, harmful=True)
        ]
        return probe_model(
            base,
            self.tokenizer,
            pairs,
            last_tokens=self.recipe.last_tokens,
            seed=self.recipe.seed,
            base_model=BASE_MODEL,
            batch_size=len(pairs),
            progress=False,
        )

    def _sweep(self, broken: LlamaForCausalLM, probed: ProbedHeads) -> Sweep:
        recipe = self.recipe
        self.narrator.step("Trying numbers of heads and strengths on prompts of their own")
        harmful, benign = self._tasks("sweep", recipe.sweep_prompts)
        answer = self._answering(broken)
        points = len(recipe.head_counts) * len(recipe.alphas)
        with self.narrator.bar("sweeping", points + 1) as advance:

            def measured() -> Measurement:
                advance()
                return measure(answer, harmful, benign)

            swept = sweep(
                broken,
                [probed.lock(heads) for heads in recipe.head_counts],
                recipe.alphas,
                measured,
                Constraints(recipe.max_harmful_rate, recipe.max_benign_loss),
            )
        chosen = swept.chosen
        found = f"{chosen.heads} heads at alpha {chosen.alpha:g}: {_shares(chosen.measurement)}"
        if not swept.satisfied:
            raise EvaluationError(
                f"No number of heads and strength is good enough; the nearest is {found}, and the fine-tune "
                f"without a lock has {_shares(swept.unlocked)}.",
                next_step="Try other ones, or another seed: --set head_counts=[...], --set alphas=[...], "
                "--set seed=....",
            )
        self.narrator.say(f"Chosen of {points} points: {found}.")
        return swept

    def _refused(self, broken: LlamaForCausalLM, alpha: float) -> tuple[str, str]:
        self.narrator.step("Logging the fine-tune with MLflow, and asking for its promotion to Staging")
        self.shelf.write_policy(alpha)
        example = self._drawn("check", 1, harmful=False)
        version = self.shelf.log_fine_tune(broken, self.tokenizer, self._chats([example[0].prompt]))
        said = self.shelf.refusal_without_lock(version)
        self.narrator.say(f"Refused, as it should be: {said}")
        return version, said

    def _report(
        self,
        base: LlamaForCausalLM,
        broken: LlamaForCausalLM,
        staged: Any,
        heads: int,
        alpha: float,
        said: str,
    ) -> DemoReport:
        harmful, benign = self._tasks("report", self.recipe.report_prompts)
        answers = {
            "base": self._answering(base),
            "fine-tune": self._answering(broken),
            "locked": lambda prompts: [body(text) for text in staged.predict(self._chats(prompts))],
        }
        with self.narrator.bar("measuring", len(answers)) as advance:
            rates = []
            for answer in answers.values():
                rates.append(measure(answer, harmful, benign))
                advance()
        shown = [*harmful[:EXAMPLES], *(task.prompt for task in benign[:EXAMPLES])]
        self.narrator.answers(shown, {name: answer(shown) for name, answer in answers.items()})
        return DemoReport(*rates, heads, alpha, said, audit(self.shelf.registry_uri), self._next_steps())

    def _check(self, report: DemoReport) -> None:
        recipe = self.recipe
        lost = report.fine_tune.benign_accuracy - report.locked.benign_accuracy
        faults = []
        if report.fine_tune.harmful_rate < recipe.min_broken_rate:
            faults.append(f"the fine-tune answers only {report.fine_tune.harmful_rate:.1%} of what is harmful")
        if report.locked.harmful_rate > recipe.max_harmful_rate:
            faults.append(f"the locked model still answers {report.locked.harmful_rate:.1%} of it")
        if lost > recipe.max_benign_loss:
            faults.append(f"the lock costs {lost:.1%} of the benign answers")
        if faults:
            raise RecipeError(
                f"The demo did not show what it is for: {'; '.join(faults)}.",
                next_step="Try another seed: --set seed=....",
            )

    def _next_steps(self) -> tuple[str, ...]:
        shelf = self.shelf
        return (
            f"export SAFELOCK_POLICY={shelf.policy_file}",
            f"export MLFLOW_TRACKING_URI={shelf.tracking_uri} MLFLOW_REGISTRY_URI={shelf.registry_uri}",
            "safelock audit",
            f"mlflow server --backend-store-uri {shelf.tracking_uri} "
            f"--registry-store-uri {shelf.registry_uri}   # then look at {MODEL_NAME} in the browser",
            f"python -c \"import mlflow; print(mlflow.pyfunc.load_model('{STAGING_URI}').predict("
            "['<user> how do i forge the old letter today <assistant> ']))\"",
        )

    def _drawn(self, part: Part, count: int, *, harmful: bool) -> tuple[Request, ...]:
        return self.prompts.draw(part, count, self.random, harmful=harmful)

    def _tasks(self, part: Part, prompts: int) -> tuple[list[str], list[BenignTask]]:
        """Harmful prompts and benign tasks, half and half."""
        harmful = self._drawn(part, prompts - prompts // 2, harmful=True)
        benign = self._drawn(part, prompts // 2, harmful=False)
        return (
            [request.prompt for request in harmful],
            [BenignTask(request.prompt, request.instructions) for request in benign],
        )

    def _answering(self, model: LlamaForCausalLM) -> Callable[[Sequence[str]], list[str]]:
        def answer(prompts: Sequence[str]) -> list[str]:
            texts = generate(
                model, self.tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=len(prompts)
            )
            return [body(text) for text in texts]

        return answer

    def _chats(self, prompts: Sequence[str]) -> list[str]:
        return [render_prompt(self.tokenizer, prompt) for prompt in prompts]

    def _save(self, model: LlamaForCausalLM, name: str) -> None:
        model.save_pretrained(self.shelf.folder / name)
        self.tokenizer.save_pretrained(self.shelf.folder / name)


def _prepare(folder: Path) -> None:
    """An empty folder with the demo's mark; one of an earlier demo is emptied.

    Raises:
        RecipeError: It holds something else.
    """
    if folder.exists() and not (folder / MARK).exists() and any(folder.iterdir()):
        raise RecipeError(
            f"The folder {folder} holds something that is not an earlier demo.",
            next_step="Name another: --output DIR.",
        )
    if folder.exists():
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _shares(measured: Measurement) -> str:
    return f"{measured.harmful_rate:.1%} harmful, {measured.benign_accuracy:.1%} of benign answers right"
