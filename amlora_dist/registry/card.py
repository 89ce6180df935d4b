"""What a bank's folder says to MLflow (``MLmodel``) and to people (``README.md``)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import Manifest

LOADER = "amlora_dist.registry.pyfunc"


EXAMPLE_FILE = "input_example.json"
_INPUTS = [
    {"type": "string", "name": "text", "required": True},
    {"type": "string", "name": "question", "required": False},
    {"type": "string", "name": "task", "required": False},
]
_PARAMS = [{"name": "max_new_tokens", "default": 0, "shape": None, "type": "long"}]

_KINDS = {
    False: (
        "Each `adapters/<k>-<task>` is a plain PEFT adapter (`peft.PeftModel.from_pretrained`), without its recipe of",
        "earlier adapters.",
    ),
    True: ("Each `adapters/<k>-<task>` is the pool of prompts as it was after that task: keys in A, prompts in B.",),
}
"""What the adapters are: LoRA, or pools of prompts."""


def mlmodel() -> str:
    """YAML of a pyfunc model whose loader module reads the folder; nothing is pickled.

    ``config`` are the keys that ``mlflow.pyfunc.load_model(..., model_config=...)`` and, for ``mlflow models serve``,
    ``MLFLOW_PYFUNC_INFERENCE_CONFIG`` may set (``registry/pyfunc.py``); empty means the default.
    """
    return (
        "flavors:\n"
        "  python_function:\n"
        f"    loader_module: {LOADER}\n"
        "    config:\n"
        "      base: ''\n"
        "      device: ''\n"
        "      dtype: auto\n"
        "saved_input_example_info:\n"
        f"  artifact_path: {EXAMPLE_FILE}\n"
        "  pandas_orient: split\n"
        "  type: dataframe\n"
        "signature:\n"
        f"  inputs: '{json.dumps(_INPUTS)}'\n"
        """  outputs: '[{"type": "string", "required": true}]'\n"""
        f"  params: '{json.dumps(_PARAMS)}'\n"
    )


def input_example() -> str:
    """JSON of a data frame that ``predict`` takes."""
    return json.dumps({"columns": ["text"], "data": [["The invoice of May is wrong, please send it again."]]}) + "\n"


def readme(manifest: Manifest) -> str:
    """The model card, Markdown."""
    base = manifest.base
    lines = [
        f"# Bank of {len(manifest.adapters)} LoRA adapters for {base.source}",
        "",
        f"Method `{manifest.method}`, router `{manifest.router.kind}`, "
        f"run `{manifest.run_id}`, stage {manifest.stage}.",
        f"Base model `{base.source}` ({base.architecture}, revision `{base.revision or 'not pinned'}`), "
        f"sha256 `{base.digest}`. The base model is not stored here.",
        "",
        "| k | task | rank | alpha | accuracy now | sha256 |",
        "|---|---|---|---|---|---|",
    ]
    matrix = manifest.accuracy_matrix
    last = dict(zip(matrix.tasks, matrix.accuracy[-1], strict=True)) if matrix.accuracy else {}
    for line in manifest.adapters:
        score = last.get(line.task)
        shown = "-" if score is None else f"{100 * score:.1f}"
        lines.append(f"| {line.index} | {line.task} | {line.rank} | {line.alpha:g} | {shown} | `{line.digest[:12]}` |")
    lines += [
        "",
        "Accuracy is exact match of the greedy output in per cent, without being told the task.",
        "",
        "## Loading",
        "",
        "```python",
        "from amlora_dist.inference.model import AMLoRAModel",
        'model = AMLoRAModel.from_bank("this/folder")',
        "```",
        "",
        *_KINDS[manifest.prompt_tokens > 0],
        "",
        "**In MLflow every adapter is stored once.** A version holds only the adapter of its own stage and refers to",
        "the earlier ones, so stock `mlflow.artifacts.download_artifacts` gives a version without its referred",
        "adapters. `amlora pull models:/NAME@ALIAS` makes a self-contained folder, and `mlflow.pyfunc.load_model`",
        "resolves the references by digest.",
        "",
    ]
    return "\n".join(lines)
