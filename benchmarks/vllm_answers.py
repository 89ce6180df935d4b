"""Test rows of a bank asked as plain texts of both engines: how many answers are equal, and why the others are not.

``--engine-python`` has vLLM, which is started with the bank's base model in fp32 and takes its rows; both engines are
behind the app of this process, one after the other. They are asked for the label of each row, and what follows it as a raw
prompt, ``--tokens`` tokens at most; then the client of ``export --format vllm`` asks the same vLLM. Of a row with another
label: its routing weight, what the own engine answers when it is set to use the strongest task's row alone (equal to vLLM's:
the mixture was the difference, which vLLM cannot compute), and how far the best two labels' shares lie apart.

    python benchmarks/vllm_answers.py models:/demo@champion --engine-python .venv-vllm/bin/python --json out.json
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from sweeps import show, write_json

from amlora_dist.config.loading import home
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.inference.routed_prompts import WHOLE, RoutedPrompt
from amlora_dist.serving.app import build_app
from amlora_dist.serving.bank import ServedBank
from amlora_dist.serving.engine_interface import EngineMaker
from amlora_dist.serving.remote_answers import answered
from amlora_dist.serving.service import Service
from amlora_dist.serving.settings import ServeSettings
from amlora_dist.serving.vllm_client import VllmClient, VllmModel
from amlora_dist.serving.vllm_engine import VllmEngine
from amlora_dist.serving.vllm_rows import write_rows
from amlora_dist.serving.vllm_start import connected
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import TaskDefaults, resolve_task
from pipelines.cluster.library_output import set_up
from pipelines.cluster.vllm_process import VllmSettings, vllm_for

DEADLINE_S = 600
NAME = "bank"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", help="models:/NAME/VERSION, models:/NAME@ALIAS or a folder, of built-in tasks")
    parser.add_argument("--engine-python", type=Path, required=True, help="the Python that has vLLM")
    parser.add_argument("--rank", type=int, default=32, help="as --engine-rank of amlora serve")
    parser.add_argument("--rows", type=int, default=25, help="test rows a task")
    parser.add_argument("--tokens", type=int, default=8, help="of a text that is written freely")
    parser.add_argument("--clients", type=int, default=8, help="requests at once")
    parser.add_argument("--json", type=Path, help="write all rows here")
    args = parser.parse_args()
    set_up(verbose=False)
    served = ServedBank.load(args.bank, NAME, device="cpu")
    model = served.model
    rows = [(task, row.text) for task in model.tasks for row in first_rows(task, args.rows)]
    own = asyncio.run(asked(served, None, rows, args))
    settings = VllmSettings(url=None, python=args.engine_python, rank=args.rank)
    options: dict[str, str | None] = {"base": None, "device": "cpu", "dtype": "fp32"}
    with vllm_for(settings, model.bank, NAME, served.version, options, print) as vllm:
        engine = partial(VllmEngine, url=vllm.url, home=home(), rank=vllm.rank)
        theirs = asyncio.run(asked(served, engine, rows, args))
        start = time.perf_counter()
        clients = asyncio.run(by_client(served, vllm.url, rows, args))
        print(f"the client answers {len(rows) / (time.perf_counter() - start):.2f} rows/s, its router included")
    own_answers = model.predict([text for _, text in rows])
    table = [
        compared(model, row, mine, other) | {"own answer": answer, "client": client}
        for row, mine, other, answer, client in zip(rows, own, theirs, own_answers, clients, strict=True)
    ]
    report(table)
    write_json(args.json, {"bank": served.version, "rows": table})


def first_rows(task: str, count: int) -> Sequence[Any]:
    """The first test rows of a built-in task."""
    spec = resolve_task(task, base_dir=Path(), defaults=TaskDefaults(max_test=count))
    return load_task(spec, splits=("test",)).rows["test"]


async def asked(
    bank: ServedBank, engine: EngineMaker | None, rows: Sequence[tuple[str, str]], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """What an engine says to each row: its label, and what it writes to the same words as a raw prompt."""
    service = Service(bank, ServeSettings(request_timeout_s=DEADLINE_S), engine)
    transport = httpx.ASGITransport(build_app(service))
    turns = asyncio.Semaphore(args.clients)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=DEADLINE_S) as client:

        async def post(path: str, **body: Any) -> Any:
            async with turns:
                answer = await client.post(path, json=body)
            if answer.status_code != 200:
                raise SystemExit(f"{path}: {answer.status_code} {answer.text}")
            return answer.json()

        async def one(text: str) -> dict[str, Any]:
            labelled = (await post("/v1/classifications", input=text, routing=True))["data"][0]
            body = {"prompt": f"{text}\nAnswer:", "raw": True, "max_tokens": args.tokens, "routing": True}
            written = (await post("/v1/completions", **body))["choices"][0]
            return {**labelled, "written": written}

        service.start()
        try:
            return list(await asyncio.gather(*(one(text) for _, text in rows)))
        finally:
            await asyncio.to_thread(service.stop)


async def by_client(
    bank: ServedBank, url: str, rows: Sequence[tuple[str, str]], args: argparse.Namespace
) -> list[str]:
    """What the client of an export answers to each row, of a server that is given the rows of the bank once more."""
    loras = write_rows(bank.model.bank, NAME, bank.version, home(), args.rank)
    prompts = bank.model.prompts([text for _, text in rows])
    client, turns = VllmClient(url), asyncio.Semaphore(args.clients)
    try:
        base = (await connected(client)).name
        for name, folder in loras.folders.items():
            await client.load(name, str(folder))

        async def one(prompt: RoutedPrompt) -> str:
            model = VllmModel(client, base if prompt.row is None else loras.names[prompt.row])
            async with turns:
                return (await answered(prompt, model)).text

        return list(await asyncio.gather(*map(one, prompts)))
    finally:
        await client.close()


def compared(model: AMLoRAModel, row: tuple[str, str], own: dict[str, Any], vllm: dict[str, Any]) -> dict[str, Any]:
    """One row's answers, and why the labels differ if they do."""
    task, text = row
    found = {
        "task": task, "text": text, "routed to": own["routing"]["task"], "weight": max(own["routing"]["tasks"].values()),
        "mixed": mixed(own), "own": own["label"], "vllm": vllm["label"], "equal": own["label"] == vllm["label"],
        "text mixed": mixed(own["written"]), "own wrote": own["written"]["text"], "vllm wrote": vllm["written"]["text"],
    }  # fmt: skip
    if not found["equal"]:
        (alone,) = model.classify([text], task=own["routing"]["task"])
        best = sorted(own["scores"].values(), reverse=True)[:2]
        found["row alone"] = alone.label
        found["margin"] = best[0] - best[-1]
        found["why"] = "rounding" if not found["mixed"] else "the mixture" if alone.label == vllm["label"] else "open"
    return found


def mixed(answer: dict[str, Any]) -> bool:
    """Whether the bank mixed rows for a text, or weighed its row less."""
    return 0 < max(answer["routing"]["tasks"].values()) < WHOLE


def report(table: Sequence[dict[str, Any]]) -> None:
    """Counts of plain rows and of rows between tasks, and each row that has another label."""
    counted = []
    for kind, between in (("plain", False), ("between tasks", True)):
        labelled = [row["equal"] for row in table if row["mixed"] == between]
        written = [row["own wrote"] == row["vllm wrote"] for row in table if row["text mixed"] == between]
        client = [row["client"] == row["own answer"] for row in table if row["mixed"] == between]
        counted.append({"rows": kind, "labels": len(labelled), "equal": sum(labelled), "client's equal": sum(client),
                        "texts": len(written), "equal texts": sum(written)})  # fmt: skip
    show("the own engine against vLLM", counted, tuple(counted[0]))
    if apart := [row for row in table if row["client"] != row["own answer"]]:
        show("another answer of the client", apart, ("task", "routed to", "weight", "own answer", "client", "vllm"))
    if others := [row for row in table if not row["equal"]]:
        show("another label", others, ("task", "routed to", "weight", "own", "vllm", "row alone", "margin", "why"))


if __name__ == "__main__":
    main()
