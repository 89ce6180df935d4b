"""Runs from Python: what ``amlora run`` does, for notebooks and programs.

    from pipelines import Sequence
    result = Sequence("configs/demo.yaml", ["workers=0"], run_id="demo").run()
    result.matrix()

The command line is a shell over this module.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import RunConfig, flat, named_file, named_keys, to_mapping, validate_config
from amlora_dist.errors import UserError
from amlora_dist.tasks.texts import kind_of
from pipelines.runs.progress import Progress, Score, progress_for
from pipelines.runs.run_ids import checked_run_id

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from amlora_dist.inference.model import AMLoRAModel
    from pipelines.runs.outlook import StageSize

OnStep = Callable[["Step"], None]
OnScore = Callable[[Score], None]
OnStage = Callable[["RunResult"], None]


@dataclass(frozen=True, slots=True)
class Step:
    """An optimizer step of a stage."""

    task: str
    done: int
    total: int
    loss: float | None
    tokens_per_second: float | None


@dataclass(frozen=True, slots=True, repr=False)
class RunResult:
    """A run's result, as far as it has come.

    ``mapping`` is the JSON object of ``amlora run --json`` (docs/reference/results.md).
    """

    mapping: Mapping[str, Any]

    @classmethod
    def of(cls, run_id: str, tracking_uri: str | None = None) -> RunResult:
        """The result of a run that was started anywhere. Raises UserError where there is none of this id."""
        from pipelines.runs.results import load_result

        return cls(load_result(checked_run_id(run_id), tracking_uri))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in order."""
        return list(self.mapping["tasks"])

    @property
    def bank(self) -> str | None:
        """``models:/NAME/VERSION`` of the newest bank; None where nothing was published."""
        versions = [stage["version"] for stage in self.mapping["stages"] if stage.get("version") is not None]
        return f"models:/{self.mapping['registered_model']}/{versions[-1]}" if versions else None

    def model(self, **options: Any) -> AMLoRAModel:
        """The newest bank in its base model; ``options`` are those of ``AMLoRAModel.from_bank``.

        Raises:
            UserError: the run has published none.
        """
        from amlora_dist.inference.model import AMLoRAModel

        if self.bank is None:
            raise UserError(f"run {self.mapping['run_id']!r} has published no bank; its method trains nothing")
        return AMLoRAModel.from_bank(self.bank, **options)

    def matrix(self) -> DataFrame:
        """The accuracy matrix: a column a task; rows untrained, after each stage, oracle. NaN: not scored."""
        import pandas

        rows = dict(self._rows())
        return pandas.DataFrame.from_dict(rows, orient="index", columns=self.tasks, dtype=float)

    def scores(self) -> DataFrame:
        """The same, one score a row: ``after``, ``stage`` (0: untrained), ``task``, ``metric``, ``score``."""
        import pandas

        names = self.mapping.get("task_metrics") or {}
        records = [
            {"after": after, "stage": number, "task": task, "metric": names.get(task, "accuracy"), "score": score}
            for number, (after, row) in enumerate(self._stage_rows())
            for task, score in zip(self.tasks, row, strict=True)
            if score is not None
        ]
        return pandas.DataFrame.from_records(records, columns=["after", "stage", "task", "metric", "score"])

    def plot(self) -> Figure:
        """Each task's score from stage to stage; a notebook shows the figure."""
        from matplotlib.figure import Figure

        class Shown(Figure):
            """Shows itself: notebooks know matplotlib's own figures only once ``pyplot`` was imported."""

            def _repr_png_(self) -> bytes:
                picture = io.BytesIO()
                self.savefig(picture, format="png", dpi=80)
                return picture.getvalue()

        figure = Shown(figsize=(7, 3.2), layout="constrained")
        axes = figure.subplots()
        matrix = self.matrix().loc[[name for name, _ in self._stage_rows()]]
        for task in self.tasks:
            axes.plot(range(len(matrix)), matrix[task], marker="o", label=task)
        axes.set_xticks(range(len(matrix)), list(matrix.index), rotation=20, ha="right")
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("score")
        axes.legend(frameon=False, fontsize=8)
        return figure

    def __repr__(self) -> str:
        done = f"{len(self.mapping['stages'])} of {len(self.tasks)} stages"
        matrix = self.matrix().to_string(float_format="{:.3f}".format, na_rep="")
        return f"RunResult({self.mapping['run_id']!r}, {done})\n{matrix}"

    def _repr_html_(self) -> str:
        """What a notebook shows of it: the matrix."""
        return str(self.matrix().to_html(float_format="{:.3f}".format, na_rep=""))

    def _stage_rows(self) -> list[tuple[str, list[float | None]]]:
        none: list[float | None] = [None] * len(self.tasks)
        rows = [("untrained", list(self.mapping.get("untrained") or none))]
        stages = zip(self.mapping["stages"], self.mapping["accuracy_matrix"], strict=False)
        return rows + [(f"after {number} {stage['task']}", list(row)) for number, (stage, row) in enumerate(stages, start=1)]

    def _rows(self) -> list[tuple[str, list[float | None]]]:
        oracle = self.mapping.get("oracle")
        return self._stage_rows() + ([("oracle", list(oracle))] if oracle else [])


class Sequence:
    """One durable run: tasks learned one after another.

    Args:
        config: a run's YAML, or a configuration from ``amlora_dist.config.loading``.
        overrides: ``key.path=value``, as on the command line.
        run_id: the same id goes on where it was; default: the configuration's name and the time.

    Raises:
        FaultsError: every fault of the configuration, at once; no model and no rows were read.
        UserError: a run id that cannot be one.
    """

    def __init__(
        self, config: str | Path | RunConfig, overrides: Listed[str] = (), *, run_id: str | None = None
    ) -> None:
        self._overrides = _checked_overrides(config, overrides)
        self._file = None if isinstance(config, RunConfig) else Path(config)
        if isinstance(config, RunConfig):
            self.config, self._named = config, frozenset(flat(to_mapping(config)))
        else:
            self.config, _ = validate_config(config, self._overrides)
            self._named = named_keys(config, self._overrides)
        self.run_id = checked_run_id(run_id or f"{self.config.name}-{time.strftime('%Y%m%d-%H%M%S')}")

    def run(
        self,
        *,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
        on_stage: OnStage | None = None,
        on_score: OnScore | None = None,
        allow_changed_data: bool = False,
        verbose: bool = False,
    ) -> RunResult:
        """Learn the sequence to its end, from wherever it is.

        Args:
            progress: shows everything; default: a bar on a terminal, lines elsewhere, on standard error.
            on_step: called at every optimizer step.
            on_stage: called with the result so far when a stage is published, in the thread that publishes it: the next one
                trains meanwhile.
            on_score: called with every score.
            allow_changed_data: go on although rows or model have changed.
            verbose: what workers' libraries say.

        Raises:
            UserError, HeldError, TrainingError, StoppedError: as ``run_sequence``.
        """
        from pipelines.cluster.library_output import quieten

        for name, call in (("on_step", on_step), ("on_stage", on_stage), ("on_score", on_score)):
            if call is not None and not callable(call):
                raise UserError(f"{name}: found {kind_of(call)}, expected a function of one argument")
        if not verbose:
            quieten()
        from pipelines.runs.resume_check import going_on
        from pipelines.runs.sequence import run_sequence

        place = contextlib.nullcontext() if self._file is None else named_file(self._file, self._overrides)
        shown = _Calling(progress or progress_for(), on_step, on_stage, on_score)
        with contextlib.closing(shown), place:
            config = going_on(self.config, named=self._named, run_id=self.run_id)
            return RunResult(
                run_sequence(
                    config, run_id=self.run_id, progress=shown, verbose=verbose, allow_changed_data=allow_changed_data
                )
            )


def _checked_overrides(config: object, overrides: object) -> list[str]:
    """The overrides. Raises UserError where a run would be another one than was meant."""
    if not isinstance(config, (str, Path, RunConfig)):
        raise UserError(f"config: found {kind_of(config)}, expected the path of a run's YAML, or a RunConfig")
    if isinstance(overrides, str) or not isinstance(overrides, Iterable):
        raise UserError(f"overrides: found {overrides!r}, expected a list of texts, such as ['workers=0', 'seed=1']")
    listed = list(overrides)
    if odd := [one for one in listed if not isinstance(one, str)]:
        raise UserError(f"overrides: found {kind_of(odd[0])}, expected texts, such as 'seed=1'")
    if listed and isinstance(config, RunConfig):
        raise UserError(
            "overrides: found some next to a RunConfig, expected none; give the file, or"
            " amlora_dist.config.loading.with_values(config, {'seed': 1})"
        )
    return listed


class _Calling:
    """Progress that tells another one, and calls back."""

    def __init__(
        self, inner: Progress, on_step: OnStep | None, on_stage: OnStage | None, on_score: OnScore | None
    ) -> None:
        self._inner, self._on_step, self._on_stage, self._on_score = inner, on_step, on_stage, on_score
        self._task = ""

    def outline(self, stages: Listed[StageSize]) -> None:
        self._inner.outline(stages)

    def stage(self, name: str, index: int, total: int) -> None:
        self._task = name
        self._inner.stage(name, index, total)

    def phase(self, name: str) -> None:
        self._inner.phase(name)

    def rows(self, task: str, mode: str, done: int, total: int) -> None:
        self._inner.rows(task, mode, done, total)

    def step(self, done: int, total: int, loss: float | None, tokens_per_second: float | None) -> None:
        self._inner.step(done, total, loss, tokens_per_second)
        if self._on_step is not None:
            self._on_step(Step(self._task, done, total, loss, tokens_per_second))

    def score(self, score: Score) -> None:
        self._inner.score(score)
        if self._on_score is not None:
            self._on_score(score)

    def stage_done(self, result: Mapping[str, Any]) -> None:
        self._inner.stage_done(result)
        if self._on_stage is not None:
            self._on_stage(RunResult(result))

    def note(self, text: str) -> None:
        self._inner.note(text)

    def close(self) -> None:
        self._inner.close()
