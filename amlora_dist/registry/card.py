"""What a bank's folder says to MLflow (``MLmodel``) and to people (``README.md``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import Manifest

LOADER = "amlora_dist.registry.pyfunc"


def mlmodel() -> str:
    """YAML of a pyfunc model whose loader module reads the folder; nothing is pickled."""
    return f"flavors:\n  python_function:\n    loader_module: {LOADER}\n"


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
        "from amlora_dist.model import AMLoRAModel",
        'model = AMLoRAModel.from_bank("this/folder")',
        "```",
        "",
        "Each `adapters/<k>-<task>` is a plain PEFT adapter (`peft.PeftModel.from_pretrained`), without its recipe of",
        "earlier adapters.",
        "",
        "**In MLflow every adapter is stored once.** A version holds only the adapter of its own stage and refers to",
        "the earlier ones, so stock `mlflow.artifacts.download_artifacts` gives a version without its referred",
        "adapters. `amlora pull models:/NAME@ALIAS` makes a self-contained folder, and `mlflow.pyfunc.load_model`",
        "resolves the references by digest.",
        "",
    ]
    return "\n".join(lines)
