"""A run as MLflow has it: result, configuration, stages, and the predictions behind every cell."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amlora_dist.errors import UserError
from amlora_dist.evaluation.intervals import Cells
from amlora_dist.evaluation.plain_choice import shown_choice
from amlora_dist.evaluation.scoring import Prediction, read_predictions
from amlora_dist.evaluation.text_metrics import common_name
from amlora_dist.registry import tags
from amlora_dist.registry.how_scored import HowScored, how_scored
from amlora_dist.registry.pulling import manifest_of
from amlora_dist.registry.runs import RunInfo
from amlora_dist.registry.store import Store

Counted = Literal["correct", "ranked_correct", "greedy_correct", "model_correct"]
"""Which score of a prediction: of the answer that counts, of the task's best label, of what was written freely, of the model
alone."""
STAGE, CONFIG, INPUTS = "stage.json", "config.json", "materials.json"


@dataclass(slots=True)
class StageFacts:
    """One stage of a run."""

    task: str
    run: str
    """MLflow's id; empty if its run is not to be found."""
    public: dict[str, Any]
    """Its entry in the result."""
    training: dict[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def reused(self) -> bool | str:
        """Whether nothing was trained, or what alone was reused."""
        return "adapter, statistics made again" if self.public.get("adapter_of") else bool(self.public.get("reused"))


@dataclass(slots=True)
class RunFacts:
    """All that a report says of a run comes from here."""

    run_id: str
    run: str
    """MLflow's id."""
    tracking_uri: str
    result: dict[str, Any]
    config: dict[str, Any]
    inputs: dict[str, Any]
    stages: list[StageFacts]
    predictions: dict[str, list[Prediction]]
    """By scoring fingerprint; what a store no longer has is missing."""
    page: str = ""
    """Address of the run's page in MLflow."""
    foreign_above: list[tuple[float, float]] = field(default_factory=list)
    """Of the last bank: share of training rows lost, and the score from which on a text is then one of no task."""

    @property
    def tasks(self) -> list[str]:
        return list(self.result["tasks"])

    @property
    def described(self) -> dict[str, dict[str, Any]]:
        """What is recorded of each task's rows and prompts, in the order of the run; further test sets come last."""
        known: dict[str, dict[str, Any]] = self.inputs.get("tasks", {})
        order = [task for task in self.tasks if task in known]
        return {task: known[task] for task in dict.fromkeys([*order, *known])}

    def page_of(self, run: str) -> str:
        """Address of a stage's page in MLflow: it is in the run's experiment. Empty if it is not known."""
        return f"{self.page.rpartition('/')[0]}/{run}" if self.page and run else ""

    @property
    def in_sequence(self) -> bool:
        """Whether there is a stage for each task (not one about all of them)."""
        return [stage.task for stage in self.stages] == self.tasks[: len(self.stages)]

    @property
    def measure(self) -> str:
        """What the scores are, by name: of all tasks the same, or only ``score``."""
        known = self.result.get("task_metrics") or {}
        return common_name(known.get(task, "accuracy") for task in self.tasks)

    @property
    def split(self) -> str:
        """Whose rows were scored."""
        return str(self.config.get("evaluation", {}).get("split", "test"))

    @property
    def how(self) -> HowScored:
        """How rows were scored: as plain texts, behind their own tasks' prompts, or told the task."""
        return how_scored(self.config, str(self.result["method"]), shown_choice(self.result))

    @property
    def matrix(self) -> list[list[float | None]]:
        """Accuracy, row 0 untrained."""
        untrained = self.result["untrained"] or [None] * len(self.tasks)
        return [list(untrained), *(list(row) for row in self.result["accuracy_matrix"])]

    def cell(self, mode: str, task: str, stage: int | None = None) -> list[Prediction] | None:
        """Predictions of a task under a mode after a 1-based stage; without one, wherever the mode was scored."""
        chosen = self.stages if stage is None else self.stages[stage - 1 : stage]
        for one in reversed(chosen):
            for score in one.scores:
                if score["mode"] == mode and score["task"] == task and score["fingerprint"] in self.predictions:
                    return self.predictions[score["fingerprint"]]
        return None

    def row_scores(self, mode: str, task: str, stage: int | None = None, *, of: Counted = "correct") -> list[float] | None:
        """Score of each test row, in the order of rows; None where one of them has none."""
        found = self.cell(mode, task, stage)
        if found is None:
            return None
        scores = [getattr(prediction, of) for prediction in found]
        return None if any(score is None for score in scores) else [float(score) for score in scores]

    def cells(self, *, of: Counted = "correct") -> Cells:
        """Scores of every test row behind the accuracy matrix, row 0 untrained."""
        lines: list[list[list[float] | None]] = [[self.row_scores("untrained", task, of=of) for task in self.tasks]]
        for number in range(1, len(self.stages) + 1):
            lines.append([self.row_scores("router", task, number, of=of) for task in self.tasks])
        return lines

    def oracle_cells(self) -> Cells:
        """Two lines: scores of the last stage, and of the oracle."""
        last = len(self.stages)
        return [
            [self.row_scores("router", task, last) for task in self.tasks],
            [self.row_scores("oracle", task) for task in self.tasks],
        ]


def read_run(store: Store, run_id: str) -> RunFacts:
    """Read a run, as far as it has come.

    Raises:
        UserError: no such run, or none of its stages is finished.
    """
    run, result = store.result_of(run_id)
    if not result["stages"]:
        raise UserError(f"run {run_id!r} has not finished a stage yet: there is nothing to report")
    facts = RunFacts(
        run_id=run_id,
        run=run,
        tracking_uri=store.connection.shown,
        result=result,
        config=store.load_json(run, CONFIG) or {},
        inputs=store.load_json(run, INPUTS) or {},
        stages=[],
        predictions={},
        page=store.page_of(run),
    )
    stage_runs = store.find_runs({tags.KIND: "stage", tags.RUN_ID: run_id})
    runs = {one.tags.get(tags.TRAINING_FINGERPRINT): one for one in stage_runs}
    for public in result["stages"]:
        facts.stages.append(_stage(store, public, runs.get(public["fingerprint"])))
        _read_predictions(store, facts.stages[-1], facts.predictions)
    return facts


def read_thresholds(store: Store, facts: RunFacts) -> list[tuple[float, float]]:
    """``RunFacts.foreign_above``, from the last version's manifest; empty where there is none, or it has no background."""
    number = facts.stages[-1].public.get("version")
    if number is None:
        return []
    try:
        manifest = manifest_of(store, store.resolve(f"models:/{facts.result['registered_model']}/{number}"))
    except UserError:  # deleted since, or damaged: the rest of the report needs none of it
        return []
    return [(float(lost), float(score)) for lost, score in manifest.router.settings.get("foreign_above") or []]


def _stage(store: Store, public: dict[str, Any], run: RunInfo | None) -> StageFacts:
    stored = (store.load_json(run.run, STAGE) if run else None) or {}
    training = stored.get("training", {})
    if public["reused"] and not training.get("losses"):
        # Taken over by reference: the run that trained it has its curve.
        theirs = _trained(store, public.get("adapter_of") or public["fingerprint"])
        if theirs is not None:
            own = {key: training[key] for key in ("mixed",) if key in training}  # of the stage's own statistics
            training = theirs | own
    return StageFacts(public["task"], run.run if run else "", public, training, stored.get("scores", []))


def _trained(store: Store, fingerprint: str) -> dict[str, Any] | None:
    """What is noted of the training of a stage where it took place; None where nobody has that any more.

    Stages may have taken their adapter from each other: each is asked once, and those that trained come first."""
    asked: set[str] = set()
    wanted = [fingerprint]
    while wanted:
        one = wanted.pop(0)
        if one in asked:
            continue
        asked.add(one)
        for other in store.find_runs({tags.KIND: "stage", tags.TRAINING_FINGERPRINT: one}):
            noted: dict[str, Any] = (store.load_json(other.run, STAGE) or {}).get("training", {})
            if noted.get("losses"):
                return noted
            if "adapter_of" in noted:
                wanted.append(noted["adapter_of"])
    return None


def _read_predictions(store: Store, stage: StageFacts, into: dict[str, list[Prediction]]) -> None:
    wanted = {f"{s['mode']}-{s['task'].replace('/', '.')}.jsonl": s["fingerprint"] for s in stage.scores}
    if not stage.run or not set(wanted.values()) - set(into):
        return
    with tempfile.TemporaryDirectory() as tmp:
        folder = store.download(stage.run, "predictions", Path(tmp))
        for name, fingerprint in wanted.items():
            if folder is not None and fingerprint not in into and (folder / name).is_file():
                into[fingerprint] = read_predictions(folder / name)
