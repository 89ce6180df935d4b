"""The stages of a sequence without MLflow and without the driver: what a method's training gives, quickly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from amlora_dist.config.loading import RunConfig
from amlora_dist.digests import tensors_digest
from amlora_dist.evaluation.scoring import Prediction, read_predictions
from amlora_dist.methods import method_for
from amlora_dist.methods.kinds import Stages
from amlora_dist.training.result import Result, read_result
from amlora_dist.training.stage import run_stage
from amlora_dist.training.stage_spec import Cell, Parent, StageWork
from pipelines.runs.inputs import gather_inputs


@dataclass(frozen=True)
class Stage:
    """A stage that was run."""

    work: StageWork
    result: Result
    predictions: dict[str, list[Prediction]]
    """By task, as the method serves the bank after the stage."""

    def loss(self, task: str) -> float:
        """Mean negative log-likelihood of the right label over the test rows of a task, nats."""
        found = [
            -(p.loglikelihoods or [])[self.work.spec(task).label_texts.index(p.answer)] for p in self.predictions[task]
        ]
        return sum(found) / len(found)


def in_this_process(work: StageWork) -> None:
    run_stage(work, distributed=False, report=lambda event: None, device=torch.device("cpu"))


def stages(
    config: RunConfig, folder: Path, run: Callable[[StageWork], None] = in_this_process, score: bool = True
) -> list[Stage]:
    """Run all stages of ``config`` below ``folder``, as the driver would."""
    return list(_stages(config, folder, run, score))


def _stages(config: RunConfig, folder: Path, run: Callable[[StageWork], None], score: bool) -> Iterator[Stage]:
    inputs = gather_inputs(config, folder)
    settings = inputs.stage_settings()
    tasks = list(inputs.specs)
    parents: list[Parent] = []
    statistics: list[str] = []
    for name in method_for(settings).stages.names(tasks, settings.method):
        method = method_for(settings)
        if method.stages is not Stages.CHAINED:
            parents, statistics = [], []
        rows = method.rows(name, [parent.task for parent in parents], tasks)
        index = len(parents) + 1
        fingerprint = inputs.training_fingerprint(
            method, index, name, [parent.digest for parent in parents], statistics, rows
        )
        cells = [Cell(task, "test", "router", task, str(folder / "scores" / name / task)) for task in tasks]
        work = StageWork(
            fingerprint=fingerprint,
            index=index,
            task=name,
            folder=str(folder / "stages" / name),
            settings=settings,
            base=asdict(inputs.base) | {"path": str(inputs.base.path)},
            tasks={task: spec.to_mapping() for task, spec in inputs.specs.items()},
            data_seed=config.seed,
            data_dir=None,
            parents=list(parents),
            cells=cells if score else [],
            deepspeed=config.deepspeed,
            evaluation_batch_size=config.evaluation.batch_size,
            rows=rows,
            data_digests={
                f"{task}/{split}": data.digest(split) for task, data in inputs.data.items() for split in data.rows
            },
        )
        run(work)
        result = read_result(work.trained)
        predictions = {cell.task: read_predictions(Path(cell.folder) / "predictions.jsonl") for cell in work.cells}
        yield Stage(work, result, predictions)
        parents = [*parents, Parent(name, result.adapter.digest(), str(work.trained))]
        statistics = [*statistics, tensors_digest(result.continuation())]
