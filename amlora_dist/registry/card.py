"""What a bank's folder says to MLflow (``MLmodel``) and to people (``README.md``)."""

from __future__ import annotations

import functools
import json
import re
from typing import TYPE_CHECKING, Any

import yaml

from amlora_dist.evaluation.field_columns import FieldColumns
from amlora_dist.methods import LORA, offered
from amlora_dist.registry.how_scored import HowScored, how_scored
from amlora_dist.tasks.task import builtin_tasks

if TYPE_CHECKING:
    from amlora_dist.registry.manifest import Manifest
    from amlora_dist.tasks.task_entry import TaskEntry

LOADER = "amlora_dist.registry.pyfunc"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


EXAMPLE_FILE = "input_example.json"
_INPUTS = [
    {"type": "string", "name": "text", "required": True},
    {"type": "string", "name": "question", "required": False},
    {"type": "string", "name": "task", "required": False},
]
_MESSAGE = {
    "type": "object",
    "properties": {"content": {"type": "string", "required": True}, "role": {"type": "string", "required": True}},
}
_CHAT_INPUTS = [
    {"type": "string", "name": "text", "required": False},
    {"type": "array", "items": _MESSAGE, "name": "messages", "required": False},
    {"type": "string", "name": "prompt", "required": False},
    *_INPUTS[1:],
]
"""Of a bank that learned conversations: a row has one of the first three."""
_FIELDS = {"type": "any", "name": "fields", "required": False}
"""Of a bank with texts made of fields: a row has a text, its fields in this column, or each in one of its name. Next to a
text a column of such a name may hold anything, and numbers are texts, so that MLflow must refuse no type."""
_PARAMS = [{"name": "max_new_tokens", "default": 0, "shape": None, "type": "long"}]


def mlmodel(manifest: Manifest) -> str:
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
        "      dtype: auto\n" + ("" if manifest.base.quantisation == "none" else "      quantisation: ''\n") +
        "saved_input_example_info:\n"
        f"  artifact_path: {EXAMPLE_FILE}\n"
        "  pandas_orient: split\n"
        "  type: dataframe\n"
        "signature:\n"
        f"  inputs: {_quoted(json.dumps(_inputs(manifest)))}\n"
        """  outputs: '[{"type": "string", "required": true}]'\n"""
        f"  params: '{json.dumps(_PARAMS)}'\n"
    )


def _inputs(manifest: Manifest) -> list[dict[str, Any]]:
    """Columns of the frame that ``predict`` takes."""
    made: list[dict[str, Any]] = [*(_CHAT_INPUTS if _converses(manifest) else _INPUTS)]
    if names := FieldColumns(manifest.learned).names:
        made = [one | {"required": False} for one in made] + [_FIELDS]
        known = [one["name"] for one in made]
        made += [{"type": "any", "name": name, "required": False} for name in names if name not in known]
    return made


def _quoted(text: str) -> str:
    """A text of YAML in single quotes."""
    return "'" + text.replace("'", "''") + "'"


def _bits(manifest: Manifest) -> str:
    """What belongs behind the base model's digest."""
    return "" if manifest.base.quantisation == "none" else f", loaded in {manifest.base.quantisation} (bitsandbytes)"


def input_example(manifest: Manifest) -> str:
    """JSON of a data frame that ``predict`` takes."""
    text = "The invoice of May is wrong, please send it again."
    if _converses(manifest):
        return json.dumps({"columns": ["messages"], "data": [[[{"role": "user", "content": text}]]]}) + "\n"
    parts = [[] if entry is None else entry.fields or [] for entry in manifest.learned.values()]
    if parts and all(len(one) > 1 for one in parts):
        return json.dumps({"columns": ["fields"], "data": [[{part.name: text for part in parts[0]}]]}) + "\n"
    return json.dumps({"columns": ["text"], "data": [[text]]}) + "\n"


def _converses(manifest: Manifest) -> bool:
    """Whether a task of the bank is asked in the base model's chat template."""
    return any(line.task_spec is not None and line.task_spec.chat for line in manifest.adapters)


def _adapters(manifest: Manifest) -> list[str]:
    """What lies in the folder of each adapter."""
    if manifest.form != LORA:
        held = f"the {manifest.form} of method `{manifest.method}` as they were after that task"
        return [f"Each `adapters/<k>-<task>` holds {held}, in the shapes of A and B."]
    return [
        "Each `adapters/<k>-<task>` is a plain PEFT adapter (`peft.PeftModel.from_pretrained`), without its recipe of",
        "earlier adapters.",
    ]


def _memory(manifest: Manifest) -> list[str]:
    """Whether rows of earlier tasks were looked at again, which a reader must know before comparing methods."""
    section = manifest.training_configuration.get("method_settings")
    count = section.get("memory_rows", 0) if isinstance(section, dict) and "memory" in offered(manifest.method) else 0
    note = f"Rows of G were refitted on a memory of at most {count} rows of each earlier task; none of them are in here."
    return [note] if count else []


def readme(manifest: Manifest, base_model: str | None = None) -> str:
    """The model card, Markdown with the Hub's front matter.

    Args:
        manifest: of the bank.
        base_model: Hub id of the base model, where the bank's source is none.
    """
    base = manifest.base
    lines = [
        *_front_matter(manifest, base_model, model_index=True),
        f"# Bank of {len(manifest.adapters)} LoRA adapters for {base.source}",
        "",
        f"Method `{manifest.method}`, router `{manifest.router.kind}`, "
        f"run `{manifest.run_id}`, stage {manifest.stage}.",
        f"Base model `{base.source}` ({base.architecture}, revision `{base.revision or 'not pinned'}`), "
        f"sha256 `{base.digest}`{_bits(manifest)}. The base model is not stored here.",
        *_memory(manifest),
        "",
        "| k | task | rank | alpha | accuracy now | sha256 |",
        "|---|---|---|---|---|---|",
    ]
    last, how = _last(manifest), _how(manifest)
    for line in manifest.adapters:
        score = last.get(line.task)
        shown = "-" if score is None else f"{score:.3f}"
        lines.append(f"| {line.index} | {line.task} | {line.rank} | {line.alpha:g} | {shown} | `{line.digest[:12]}` |")
    lines += [
        "",
        f"Accuracy is the share of test rows whose {how.what} is right. {how.sentence}",
        *_other_metrics(manifest),
        "",
        "## Loading",
        "",
        "```python",
        "from amlora_dist import AMLoRAModel",
        'model = AMLoRAModel.from_bank("this/folder")   # from the Hub: amlora pull hf://OWNER/NAME this/folder',
        *_chat_example(manifest),
        "```",
        "",
        *_adapters(manifest),
        "",
        "**In MLflow every adapter is stored once.** A version holds only the adapter of its own stage and refers to",
        "the earlier ones, so stock `mlflow.artifacts.download_artifacts` gives a version without its referred",
        "adapters. `amlora pull models:/NAME@ALIAS` makes a self-contained folder, and `mlflow.pyfunc.load_model`",
        "resolves the references by digest.",
        "",
    ]
    return "\n".join(lines)


def adapter_readme(manifest: Manifest, task: str, rank: int) -> str:
    """The card of one task's row as an adapter of its own, Markdown with the Hub's front matter.

    Args:
        manifest: of the bank that it is from.
        task: whose row it is.
        rank: of the row.
    """
    entry = next(line.task_spec for line in manifest.adapters if line.task == task)
    lines = [
        *_front_matter(manifest, None, model_index=False, only=task),
        f"# LoRA of task {task}",
        "",
        f"The row of task `{task}` in the bank of run `{manifest.run_id}`, stage {manifest.stage}, as one LoRA of rank",
        f"{rank}: what the task takes over from earlier adapters is in it. Without the bank's router somebody else has to",
        "say which texts it is for.",
        "",
        f"Base model `{manifest.base.source}`, sha256 `{manifest.base.digest}`{_bits(manifest)}.",
    ]
    if entry is not None:
        labels = "free text" if entry.labels is None else ", ".join(f"`{label}`" for label in entry.labels)
        prompt = "What the user says last, in the base model's chat template" if entry.chat else (
            "The prompt that it was trained behind"
        )
        lines += ["", f"Answers: {labels}. {prompt} (Jinja):", "", "```jinja", entry.template, "```"]
        lines += ["", f"System: {entry.system}"] if entry.chat and entry.system is not None else []
        lines += [] if entry.question is None else ["", f"Question: {entry.question}"]
    lines += ["", "```python", "import peft", 'peft.PeftModel.from_pretrained(base_model, "this/folder")', "```", ""]
    return "\n".join(lines)


def _front_matter(manifest: Manifest, base_model: str | None, *, model_index: bool, only: str | None = None) -> list[str]:
    """The Hub's metadata (https://huggingface.co/docs/hub/model-cards); what is not known is left out."""
    named = base_model or (manifest.base.source if _HUB_ID.fullmatch(manifest.base.source) else None)
    value: dict[str, Any] = {} if named is None else {"base_model": named, "base_model_relation": "adapter"}
    value |= {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "continual-learning", "mixture-of-loras", "amlora", *(_tag(only) if only else [])],
    }
    tasks = [only] if only else manifest.tasks
    if found := list(dict.fromkeys(name for task in tasks for name in _data_sets(manifest, task))):
        value["datasets"] = found
    if model_index and (results := _results(manifest)):
        value["model-index"] = [{"name": manifest.run_id or "bank", "results": results}]
    return ["---", yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip("\n"), "---", ""]


def _results(manifest: Manifest) -> list[dict[str, Any]]:
    """Scores of the bank's tasks after its last stage, in the form of the Hub's ``model-index``."""
    last, how = _last(manifest), _how(manifest)
    results = []
    for line in manifest.adapters:
        if (score := last.get(line.task)) is None:
            continue
        free = line.task_spec is not None and line.task_spec.labels is None
        kind = "text-generation" if free else "text-classification"
        counted = _metric(line.task_spec) if free else "accuracy"
        metric = {"type": counted, "value": round(score, 6), "name": f"{how.what}, test rows"}
        data = next(iter(_data_sets(manifest, line.task)), line.task)
        results.append({"task": {"type": kind}, "dataset": {"name": line.task, "type": data}, "metrics": [metric]})
    return results


def _how(manifest: Manifest) -> HowScored:
    return how_scored(manifest.training_configuration, manifest.method, manifest.plain_text)


def _last(manifest: Manifest) -> dict[str, float | None]:
    matrix = manifest.accuracy_matrix
    return dict(zip(matrix.tasks, matrix.accuracy[-1], strict=True)) if matrix.accuracy else {}


def _metric(entry: TaskEntry | None) -> str:
    """The metric's name on the Hub for free text: the bank's own where it names one."""
    return "score" if entry is None or entry.metric is None else entry.metric


def _other_metrics(manifest: Manifest) -> list[str]:
    """Tasks whose free text is counted by something else."""
    named = [(line.task, line.task_spec.metric) for line in manifest.adapters if line.task_spec is not None]
    found = [f"`{task}` by {metric}" for task, metric in named if metric is not None]
    return [f"Free text is counted by the task's metric: {', '.join(found)}."] if found else []


def _chat_example(manifest: Manifest) -> list[str]:
    """How a bank that learned conversations is asked."""
    if not _converses(manifest):
        return []
    return ['model.chat([{"role": "user", "content": "..."}]).text   # in the base model\'s chat template']


def _data_sets(manifest: Manifest, task: str) -> list[str]:
    """Hub repository of a built-in task's rows; of other tasks nobody says where they come from."""
    named = manifest.training_configuration.get("tasks")
    found = _hub_sources().get(task) if isinstance(named, list) and task in named else None
    return [] if found is None else [found]


@functools.cache
def _hub_sources() -> dict[str, str]:
    """Hub repository of each built-in task that has one."""
    found = {spec.name: spec.source.repository for spec in builtin_tasks()}
    return {name: repository for name, repository in found.items() if repository}


def _tag(task: str) -> list[str]:
    return [re.sub(r"[^A-Za-z0-9_.-]+", "-", task)]
