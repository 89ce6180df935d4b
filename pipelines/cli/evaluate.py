"""``amlora evaluate``: lm-evaluation-harness on a bank as served and on its base model, side by side."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from amlora_dist.errors import UserError
from amlora_dist.files import write_bytes
from pipelines.cli.options import Bank, Base, BatchSize, Device, Dtype, Json, Quantisation, TrackingUri
from pipelines.cli.output import stdout_to_stderr
from pipelines.cli.row_output import checked_place
from pipelines.cli.tables import console_for

RESAMPLES = 1000
"""Of a metric whose standard error has no formula."""


@dataclass(frozen=True, slots=True)
class HarnessOptions:
    """What the harness is to run: its tasks by name, a folder with tasks of one's own, and how."""

    tasks: Sequence[str]
    folder: Path | None = None
    limit: int | None = None
    few_shot: int | None = None
    chat: bool = False
    batch_size: int = 8


@dataclass(frozen=True, slots=True)
class MetricComparison:
    """One metric of one task, of the bank and of its base model; errors are standard errors, None where there is none."""

    task: str
    metric: str
    filter: str
    bank: float
    bank_error: float | None
    base: float
    base_error: float | None


def evaluate(
    bank: Bank,
    tasks: Annotated[list[str], typer.Option("--tasks", help="The harness's tasks; again, or with commas, for more.")],
    tasks_folder: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task; default: all.")] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples before each row; default: the task's.")] = None,
    as_chat: Annotated[bool, typer.Option("--chat", help="Ask in the base model's chat template.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for the scores.")] = None,
    batch_size: BatchSize = 8,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Run lm-evaluation-harness on a bank as served and on its base model: what was kept of general ability."""
    names = [name for given in tasks for name in given.split(",") if name]
    asked = HarnessOptions(names, tasks_folder, limit, few_shot, as_chat, batch_size)
    options = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation, "tracking_uri": tracking_uri}
    evaluate_bank(bank, asked, output, options, as_json=as_json)


def evaluate_bank(bank: str, asked: HarnessOptions, output: Path | None, options: dict[str, Any], *, as_json: bool) -> None:
    """``amlora evaluate``.

    Raises:
        UserError: the harness is not installed, an unknown task, no such bank, one that cannot be asked.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("evaluate: found no lm_eval, expected lm-evaluation-harness: pip install 'amlora-dist[evaluate]'")
    from pipelines.cli.scoring import bank_model

    place = None if output is None else _json_place(output)
    with stdout_to_stderr():
        manager = task_manager(asked)
        model = bank_model(bank, options)
        found = scores(model, asked, manager)
    written = {
        "bank": model.uri or bank, "base": model.base.source, "chat": asked.chat, "limit": asked.limit,
        "few_shot": asked.few_shot, "scores": [asdict(line) for line in found],
    }  # fmt: skip
    if place is not None:
        write_bytes(place, (json.dumps(written, indent=1) + "\n").encode())
    if as_json:
        print(json.dumps(written))
        return
    table = Table(box=None, pad_edge=False, show_edge=False)
    for name in ("task", "metric", "filter", "bank", "base", "bank - base"):
        table.add_column(name, justify="left" if name in ("task", "metric", "filter") else "right")
    for line in found:
        shown = [_shown(line.bank, line.bank_error), _shown(line.base, line.base_error), f"{line.bank - line.base:+.4f}"]
        table.add_row(line.task, line.metric, line.filter, *shown)
    console = console_for()
    console.print(f"{written['bank']}, and its base model {written['base']}", markup=False, highlight=False)
    console.print(table)


def task_manager(asked: HarnessOptions) -> Any:
    """The harness's index of tasks. Raises UserError for a task or folder that is not there."""
    from lm_eval.tasks import TaskManager

    folder = None if asked.folder is None else asked.folder.expanduser()
    if folder is not None and not folder.is_dir():
        raise UserError(f"--tasks-folder: found {folder}, expected a folder of the harness's task files (*.yaml)")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    if not asked.tasks or (unknown := [name for name in asked.tasks if name not in known]):
        found = ", ".join(unknown) if asked.tasks else "none"
        raise UserError(
            f"--tasks: found {found}, expected names of the harness's {len(known)} tasks (lm_eval ls tasks), or of those in"
            " --tasks-folder"
        )
    return manager


def scores(model: Any, asked: HarnessOptions, manager: Any) -> list[MetricComparison]:
    """Every metric of every task, of the bank and of its base model.

    Args:
        model: an ``AMLoRAModel``.
        asked: what to run.
        manager: of ``task_manager``.
    """
    from lm_eval import simple_evaluate

    from amlora_dist.serving.bank import ServedBank
    from amlora_dist.tasks.chat import ChatTemplate
    from amlora_dist.tasks.conversations import Turn
    from pipelines.cli.harness import harness_models

    if asked.chat and not getattr(model.tokenizer, "chat_template", None):
        raise UserError("--chat: the base model's tokenizer has no chat template; leave the option out")
    if asked.chat:
        try:
            ChatTemplate(model.tokenizer).render([Turn("user", "a")])  # the harness renders it without any bounds
        except UserError as error:
            raise UserError(f"--chat: {error}; leave the option out") from None
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    results: list[Mapping[str, Mapping[str, Any]]] = []
    with harness_models(ServedBank(model, "bank"), asked.batch_size) as models:
        for one in models:
            found = simple_evaluate(
                model=one, tasks=list(asked.tasks), task_manager=manager, limit=asked.limit, num_fewshot=asked.few_shot,
                apply_chat_template=asked.chat, bootstrap_iters=RESAMPLES, log_samples=False,
            )  # fmt: skip
            assert found is not None, "one process has all results"
            results.append(found["results"])
    bank, base = results
    return [
        MetricComparison(
            task, metric, kind, values[key], _error(values, metric, kind), base[task][key], _error(base[task], metric, kind)
        )
        for task, values in bank.items()
        for key in values
        if isinstance(values[key], (int, float)) and "," in key
        for metric, _, kind in [key.partition(",")]
        if not metric.endswith("_stderr")
    ]


def _error(values: Mapping[str, Any], metric: str, kind: str) -> float | None:
    found = values.get(f"{metric}_stderr,{kind}")
    return float(found) if isinstance(found, (int, float)) else None


def _shown(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} +- {error:.4f}"


def _json_place(output: Path) -> Path:
    """Raises UserError where the file cannot be written, before anything is computed."""
    if output.suffix.lower() != ".json":
        raise UserError(f"--output: found {output}, expected a .json file; name such a file")
    found = checked_place(output, "-").path
    if found is None:
        raise UserError(f"--output: found {output}, expected a file; name one")
    return found


COMMANDS: tuple[Callable[..., None], ...] = (evaluate,)
