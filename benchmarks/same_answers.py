"""Whether every way of asking a bank gives the answer that was scored: matrix, command line, server, MLflow.

The test rows of a finished run go in as a user sends them, the text alone, four ways: the predictions that the run's last
cells of the accuracy matrix were counted from; ``amlora classify`` in a process of its own; ``POST /v1/chat/completions``
by OpenAI's client; and MLflow's pyfunc. Printed is how many answers of each differ from what was scored, and which. In fp32
none should; in bf16 an answer that hung on the last bit can tip, since batches differ.

    python benchmarks/same_answers.py demo
    python benchmarks/same_answers.py --quick              # a tiny run of its own: shows that it runs
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from finished_bank import task_rows
from openai import OpenAI
from sweeps import LEAST, show, write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from amlora_dist.config.loading import from_mapping, home
from amlora_dist.errors import AmloraError, UserError
from amlora_dist.registry.store import Store
from amlora_dist.reporting.facts import read_run
from amlora_dist.serving.bank import ServedBank
from pipelines.cluster.library_output import set_up

PATIENCE_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="id of a finished run of labelled tasks in AMLORA_HOME")
    parser.add_argument("--data-dir", type=Path, help="rows as <task>/<split>.jsonl; default: packaged tasks and the Hub")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a tiny run of its own: ends within a minute")
    args = parser.parse_args()
    if args.run is None and not args.quick:
        parser.error("RUN: which run? `make demo` leaves demo")
    set_up(verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        tasks = _quick(args, Path(folder)) if args.quick else None
        try:
            bank, texts, scored = rows_of(args.run, args.data_dir, tasks)
            ways = {"amlora classify": by_command, "chat completions": by_server, "pyfunc": by_pyfunc}
            answers = {name: way(bank, texts, Path(folder)) for name, way in ways.items()}
        except AmloraError as error:
            parser.error(str(error))
    table = []
    for name, found in answers.items():
        places = [place for place, (one, other) in enumerate(zip(scored, found, strict=True)) if one != other]
        table.append({"asked by": name, "rows": len(texts), "differ": len(places)})
        for place in places:
            print(f"{name}: {scored[place]!r} was scored, {found[place]!r} is answered: {texts[place]!r}")
    show(f"{bank}, test rows of {args.run}", table, ("asked by", "rows", "differ"))
    write_json(args.json, {"run": args.run, "bank": bank, "table": table})


def rows_of(run: str, data_dir: Path | None, tasks: Sequence[str] | None) -> tuple[str, list[str], list[str]]:
    """The bank that a run ended with, the texts of its test rows, and what they were scored by.

    Raises:
        UserError: no such run, a task of it has no labels, or its rows are not those that were scored.
    """
    facts = read_run(Store.open(home()), run)
    config = from_mapping(facts.config)
    names = tasks or [task if isinstance(task, str) else task["task"] for task in config.tasks]
    most = config.task_defaults.max_test or sys.maxsize
    texts, scored = [], []
    for task, rows in task_rows(list(names), data_dir, "test", most=most, seed=config.seed):
        cell = facts.cell("router", task, len(facts.stages))
        if cell is None or any(one.served is None or one.ranked is None for one in cell):
            raise UserError(f"RUN: {run} has no served answers of labelled rows for {task}: score it as plain text first")
        served = {one.row: str(one.served) for one in cell}
        if served.keys() != {row.number for row in rows}:
            raise UserError(f"RUN: {task}: {len(rows)} test rows, not the {len(cell)} that were scored")
        texts += [row.text for row in rows]
        scored += [served[row.number] for row in rows]
    return f"models:/{facts.result['registered_model']}/{facts.result['stages'][-1]['version']}", texts, scored


def by_command(bank: str, texts: Sequence[str], folder: Path) -> list[str]:
    """By ``amlora classify``, in a process of its own."""
    asked, answered = folder / "texts.jsonl", folder / "answers.jsonl"
    asked.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.cli", "classify", bank, str(asked), "-o", str(answered)]
    subprocess.run(command, check=True, timeout=PATIENCE_S, cwd=Path(__file__).resolve().parents[1])
    return [json.loads(line)["label"] for line in answered.read_text(encoding="utf-8").splitlines()]


def by_server(bank: str, texts: Sequence[str], _: Path) -> list[str]:
    """By the server's chat endpoint and OpenAI's client, one text at a time."""
    from tests.serving.servers import running

    with running(ServedBank.load(bank, "served", device="cpu")) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60)

        def ask(text: str) -> str:
            reply = client.chat.completions.create(model="served", messages=[{"role": "user", "content": text}])
            return reply.choices[0].message.content or ""

        return [ask(text) for text in texts]


def by_pyfunc(bank: str, texts: Sequence[str], _: Path) -> list[str]:
    """By the model that MLflow loads."""
    import mlflow

    mlflow.set_tracking_uri(Store.open(home(), reads=True).connection.uri)
    return [str(one) for one in mlflow.pyfunc.load_model(bank).predict(pd.DataFrame({"text": list(texts)}))]


def _quick(args: argparse.Namespace, folder: Path) -> list[str]:
    """A tiny run of three tasks in a home that is thrown away; the files of its tasks."""
    from pipelines import Sequence as Run
    from tests.tiny_config import write_config

    os.environ["AMLORA_HOME"] = str(folder / "home")
    training = {"epochs": 1, "batch_size": 6, "learning_rate": 3e-2, "warmup_steps": 2, "probe_rows": 8}
    args.run = "quick"
    result = Run(write_config(folder, training=training), list(LEAST), run_id="quick").run()
    return [str(folder / "tasks" / f"{task}.yaml") for task in result.tasks]


if __name__ == "__main__":
    main()
