"""A bank for other servers: vLLM, Ray Serve LLM and llama.cpp, each with a client that routes.

vLLM and Ray Serve LLM take one layout: a folder of adapters, each called as it is served. vLLM's resolver plugin looks
there for a name that it does not know, and takes an adapter whose ``base_model_name_or_path`` is its own ``--model``; Ray
Serve LLM looks below ``dynamic_lora_loading_path`` for what is behind the colon of ``BASE:NAME``. Both apply one adapter
to a request. llama.cpp applies any number of adapters, each at a scale of its own, which is this project's mixture.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from amlora_dist.errors import UserError
from amlora_dist.registry.exports import (
    client_source,
    new_folder,
    quoted,
    row_adapter,
    served_names,
    write_index,
    write_row,
)
from amlora_dist.registry.gguf_adapters import check_architecture, write_gguf
from amlora_dist.registry.tensor_files import write_text

if TYPE_CHECKING:
    from amlora_dist.base_model import BaseModel
    from amlora_dist.registry.bank_folder import Bank

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for ``--max-lora-rank``."""
ADAPTERS = "adapters"
"""Folder of an export whose subfolders are adapters by the names under which they are served."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BUCKET = re.compile(r"(s3|gs|abfss|azure)://[^\s]+")


def served_base(base: BaseModel, given: str | None) -> str:
    """The base model as another server is given it: a folder that is there, or a Hub id.

    Args:
        base: the bank's, as it was found on this machine.
        given: ``--served-base``; None: the bank's own Hub id, or else the folder of ``base``.

    Raises:
        UserError: ``given`` is neither.
    """
    if given is None:
        is_hub = not base.source.startswith("package:") and not Path(base.source).exists()
        return base.source if is_hub and _HUB_ID.fullmatch(base.source) else str(base.path)
    folder = Path(given).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"--served-base: found {given!r} without config.json, expected the folder of a model")
        return str(folder.resolve())
    if not _HUB_ID.fullmatch(given):
        raise UserError(f"--served-base: found {given!r}, expected a folder that is there, or a Hub id such as owner/name")
    return given


def export_vllm(folder: Path, bank: Bank, *, base: str, bucket: str | None = None, **more: Any) -> Path:
    """Write what vLLM and Ray Serve LLM take, a routing table, and a client that picks the adapter per request.

    vLLM applies one adapter to a request and cannot mix (vllm#49705): the client takes the strongest task's row.

    Args:
        folder: must not exist, or be empty.
        bank: to export.
        base: ``served_base``: what vLLM is given as ``--model``.
        bucket: where the folder ``adapters`` will lie for Ray Serve LLM (``s3://BUCKET/PREFIX``); None: no such file.
        more: further entries of ``export.json``.

    Raises:
        UserError: a row's rank is larger than vLLM takes, or ``bucket`` is none.
    """
    if bucket is not None and not _BUCKET.fullmatch(bucket):
        raise UserError(f"--bucket: found {bucket!r}, expected s3://, gs://, abfss:// or azure://, for Ray Serve LLM")
    tasks = bank.manifest.tasks
    ranks = {task: row_adapter(bank, task).rank for task in tasks}
    largest = max(ranks, key=ranks.__getitem__)
    limit = next((rank for rank in VLLM_RANKS if rank >= ranks[largest]), None)
    if limit is None:
        raise UserError(
            f"task {largest!r}: its row has rank {ranks[largest]}, vLLM takes at most {VLLM_RANKS[-1]}; "
            "train with a lower adapters.rank or without recipes"
        )
    new_folder(folder)
    names = served_names(tasks)
    for task, name in names.items():
        write_row(folder / ADAPTERS / name, bank, task, base)
    listed = [_listed(bank, task, f"{ADAPTERS}/{names[task]}", ranks[task]) for task in tasks]
    write_index(folder, bank.manifest, "vllm", adapters=listed, max_lora_rank=limit, served_base=base, **more)
    model_id = Path(base).name
    table = {"base": base, "ray_model_id": model_id, "models": names}
    write_text(folder / "routing.json", json.dumps(table, indent=1) + "\n")
    write_text(
        folder / "serve.sh",
        "#!/bin/sh\n"
        "# Starts vLLM, which loads an adapter when it is asked for by its name. Options are passed on.\n"
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        "export VLLM_ALLOW_RUNTIME_LORA_UPDATING=true\n"
        f'export VLLM_LORA_RESOLVER_CACHE_DIR="$here/{ADAPTERS}"\n'
        f"exec python -m vllm.entrypoints.openai.api_server --model {quoted(base)} --enable-lora \\\n"
        f'    --max-loras {min(len(names), 8)} --max-lora-rank {limit} "$@"\n',
    )
    if bucket is not None:
        write_text(folder / "ray_serve.yaml", _ray_serve(base, model_id, bucket, len(names), limit))
    write_text(folder / "client.py", client_source("vllm_client.py.txt"))
    return folder


def export_gguf(folder: Path, bank: Bank, base: BaseModel, **more: Any) -> Path:
    """Write each task's row as a LoRA in GGUF, fp16, and a client that sends llama.cpp every adapter with its scale.

    Args:
        folder: must not exist, or be empty.
        bank: to export.
        base: the bank's base model; its configuration names the tensors.
        more: further entries of ``export.json``.

    Raises:
        UserError: an architecture whose layout in GGUF is not known here.
    """
    check_architecture(base)
    new_folder(folder)
    names = served_names(bank.manifest.tasks)
    listed = []
    for task, name in names.items():
        adapter = row_adapter(bank, task)
        write_gguf(folder / f"{name}.gguf", adapter, base)
        listed.append(_listed(bank, task, f"{name}.gguf", adapter.rank))
    write_index(folder, bank.manifest, "gguf", adapters=listed, **more)
    files = {task: f"{name}.gguf" for task, name in names.items()}
    write_text(folder / "routing.json", json.dumps({"adapters": files}, indent=1) + "\n")
    options = " \\\n    ".join(f'--lora "$here"/{quoted(file)}' for file in files.values())
    write_text(
        folder / "serve.sh",
        "#!/bin/sh\n"
        "# sh serve.sh BASE.gguf [options]: starts llama.cpp's server with every adapter. Ask it by client.py: a request\n"
        "# that names no scales gets all of them whole, whatever --lora-init-without-apply says (llama.cpp#28674).\n"
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        'base=${1:?give the base model as GGUF} && shift\n'
        f'exec llama-server -m "$base" --lora-init-without-apply \\\n    {options} "$@"\n',
    )
    write_text(folder / "client.py", client_source("llama_cpp_client.py.txt"))
    return folder


def _listed(bank: Bank, task: str, place: str, rank: int) -> dict[str, Any]:
    line = next(line for line in bank.manifest.adapters if line.task == task)
    labels = None if line.task_spec is None else line.task_spec.labels
    return {"task": task, "folder" if "/" in place else "file": place, "rank": rank, "labels": labels}


def _ray_serve(base: str, model_id: str, bucket: str, adapters: int, rank: int) -> str:
    """A Serve application of Ray Serve LLM; ``serve run ray_serve.yaml``."""
    engine = {"enable_lora": True, "max_lora_rank": rank, "max_loras": min(adapters, 8)}
    config = {
        "model_loading_config": {"model_id": model_id, "model_source": base},
        "lora_config": {"dynamic_lora_loading_path": bucket, "max_num_adapters_per_replica": min(adapters, 16)},
        "engine_kwargs": engine,
    }
    application = {"name": "bank", "route_prefix": "/", "import_path": "ray.serve.llm:build_openai_app",
                   "args": {"llm_configs": [config]}}  # fmt: skip
    head = f"# serve run ray_serve.yaml, once {ADAPTERS}/ lies at {bucket}; clients ask for {model_id}:NAME.\n"
    return head + yaml.safe_dump({"applications": [application]}, sort_keys=False)


