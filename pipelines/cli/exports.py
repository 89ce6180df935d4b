"""What ``export`` and ``import-peft`` do: load what they need, call ``amlora_dist.registry.exports``, say what came out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.errors import UserError
from amlora_dist.privacy import shown
from pipelines.cli.batch_inference import bank_and_tasks
from pipelines.cli.output import stdout_to_stderr
from pipelines.cli.row_input import opened
from pipelines.cluster.resources import check_folder

if TYPE_CHECKING:
    from amlora_dist.adapters.adapter import Adapter
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.registry.bank_folder import Bank
    from amlora_dist.registry.manifest import BaseEntry

SAMPLE_ROWS = 512
MOST_WEIGHT = 100
"""Of a task in a merged model; larger ones leave nothing of it, or no numbers at all."""
ALIKE = 0.02
"""Share of texts with another first token up to which an export counts as answering like its bank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What ``export`` is asked for: the options of the same names."""

    form: str
    weights: Sequence[str] = ()
    sample: Path | None = None
    column: str = "text"
    served_base: str | None = None
    bucket: str | None = None


def export_bank(bank: str, dest: Path, asked: Export, options: dict[str, Any]) -> Iterator[str]:
    """Export a bank and say what was written.

    Raises:
        UserError: options that do not fit the format, no such task, a folder that is not empty.
    """
    from amlora_dist.registry.exports import discard, export_peft, new_folder

    shares, form = _shares(asked.weights), asked.form
    if (form == "merged") != bool(shares):
        raise UserError("--weights TASK=WEIGHT belongs to --format merged, which needs at least one")
    if form in ("merged", "top1") and asked.sample is None:
        raise UserError(f"--format {form} needs --sample FILE: texts to measure its gap to the mixture on")
    for name, value in (("--served-base", asked.served_base), ("--bucket", asked.bucket)):
        if value is not None and form != "vllm":
            raise UserError(f"{name} belongs to --format vllm")
    if asked.bucket is not None and re.search(r"://[^/]*:[^/]*@|[?#]", asked.bucket):
        raise UserError(
            f"--bucket: found {shown(asked.bucket)} with a password or a query, which would be written into DEST; give the"
            " address alone, and what opens it to the servers"
        )
    check_folder(dest, "DEST")
    if form == "merged":
        _check_mergeable(bank, options)
    tasks = bank_and_tasks(bank, options)[1] if shares else []
    if unknown := sorted(shares.keys() - set(tasks)):
        raise UserError(f"--weights: found task {unknown[0]!r}, the bank's tasks are {', '.join(tasks)}")
    texts = _texts(asked.sample, asked.column) if asked.sample else None
    new_folder(dest)
    try:
        if form == "peft":
            exported = _bank_alone(bank, options)
            base, remark = _base_of_peft(exported.manifest.base, options)
            export_peft(dest, exported, base=base)
            yield from remark
            yield f"{len(exported.adapters)} PEFT adapters, one for each task's row, are in {dest}"
        elif form in ("vllm", "gguf"):
            yield from _for_server(bank, dest, asked, texts, options)
        else:
            yield from _measured(bank, dest, form, shares, texts or [], options)
    except BaseException:
        discard(dest)
        raise


def _check_mergeable(bank: str, options: dict[str, Any]) -> None:
    """Adapters cannot be added to weights in 4 or 8 bits; into others they are merged where somebody asks for that."""
    bits = options.get("quantisation") or _bank_alone(bank, options).manifest.base.quantisation
    if bits != "none":
        raise UserError(
            f"--format merged: found a base model in {bits}, expected one whose weights can be added to; merge into the one"
            " that is not quantised with --quantisation none: it answers otherwise than the bank was measured"
        )


def _measured(
    bank: str, dest: Path, form: str, shares: dict[str, float], texts: list[str], options: dict[str, Any]
) -> Iterator[str]:
    from amlora_dist.base_model import load_model
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.registry.exports import export_merged, export_peft

    remark: list[str] = []
    with stdout_to_stderr():
        model = AMLoRAModel.from_bank(bank, **options)
        gap = measure_gap(model, texts, shares or None)
        if form == "merged":
            dtype = next(model.transformer.parameters()).dtype
            plain = load_model(model.base, dtype=dtype)
            export_merged(dest, model.bank, plain, model.tokenizer, shares, gap_to_mixture=gap)
        else:
            base, remark = _base_of_peft(model.bank.manifest.base, options)
            export_peft(dest, model.bank, kind="top1", base=base, gap_to_mixture=gap)
    yield from _unlike(gap, form)
    yield from remark
    yield f"{form} of {len(model.tasks)} tasks is in {dest}"
    yield _gap_words(gap)


def _for_server(
    bank: str, dest: Path, asked: Export, texts: list[str] | None, options: dict[str, Any]
) -> Iterator[str]:
    """Folders for vLLM and llama.cpp; the base model's weights are loaded only to measure a gap."""
    from amlora_dist.inference.gguf_gap import gguf_gap
    from amlora_dist.inference.loading import resolve_bank_base
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.registry.exports import amend_index
    from amlora_dist.registry.server_exports import export_gguf, export_vllm, served_base

    with stdout_to_stderr():
        alone = _bank_alone(bank, options)
        base = resolve_bank_base(alone.manifest.base, options.get("base"))
        if asked.form == "gguf":
            export_gguf(dest, alone, base)
        else:
            message = asked.served_base
            if message is not None and Path(message).expanduser().is_dir():
                resolve_bank_base(alone.manifest.base, Path(message).expanduser())  # the very model, by digest
            export_vllm(dest, alone, base=served_base(base, message), bucket=asked.bucket)
        gap = None
        if texts is not None:
            model = AMLoRAModel.from_bank(bank, **options)
            gap = measure_gap(model, texts, None) if asked.form == "vllm" else gguf_gap(model, dest, texts)
            amend_index(dest, gap_to_mixture=gap)
    yield f"{asked.form} of {len(alone.adapters)} tasks is in {dest}"
    if (bits := alone.manifest.base.quantisation) != "none":
        yield f"learned on its base in {bits}: a server with another base answers otherwise, which no gap here tells"
    if gap is not None:
        yield _gap_words(gap)


def _base_of_peft(entry: BaseEntry, options: dict[str, Any]) -> tuple[str | None, list[str]]:
    """What PEFT's ``AutoPeftModelForCausalLM`` finds the base model by, and what to say where that is nothing: a Hub id as
    it is (None), of a packaged or local model its folder on this machine. A bank names a local one by its last part."""
    from amlora_dist.inference.loading import remembered_base, resolve_bank_base

    base, of_owner = options.get("base"), re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", entry.source) is not None
    if base is None and of_owner and not Path(entry.source).exists() and remembered_base(entry.digest) is None:
        return None, []
    try:
        with stdout_to_stderr():
            found = resolve_bank_base(entry, base)
    except UserError as error:
        return None, [f"warning: the adapters name {entry.source!r} as their base model, where PEFT finds none: {error}"]
    local = base is not None or found.source.startswith("package:") or Path(found.source).expanduser().exists()
    return str(found.path.absolute()) if local else None, []


def _unlike(gap: dict[str, float], form: str) -> Iterator[str]:
    """A warning of an export whose answers are not the bank's, with the number first."""
    if (share := gap["other_first_token"]) > ALIKE:
        why = "one mixture for every text" if form == "merged" else "the strongest task's row alone"
        message = f"{share:.3f} of {gap['texts']} texts are answered unlike the bank"
        yield f"warning: {message}, which weighs its adapters for each text: this is {why}"


def _gap_words(gap: dict[str, float]) -> str:
    return (
        f"gap to the mixture over {gap['texts']} texts: another first token for {gap['other_first_token']:.3f} of them, "
        f"mean KL {gap['mean_kl_nats']:.4f} nats, largest difference of a logit {gap['largest_logit_difference']:.4f}"
    )


def measure_gap(model: AMLoRAModel, texts: Sequence[str], shares: dict[str, float] | None) -> dict[str, float]:
    """How far fixed weights (None: the strongest task's row alone) are from the router's mixture, at the first token.

    Weights that are merged into the base model are a constant gate, so the bank itself can say.
    """
    import torch

    from amlora_dist.registry.exports import gap_between

    routed = torch.tensor([list(route.tasks.values()) for route in model.route(texts)])
    if shares is None:
        best = routed.argmax(dim=1)
        fixed = torch.nn.functional.one_hot(best, len(model.tasks)).float() * (routed.amax(dim=1) > 0)[:, None]
    else:
        if unknown := sorted(shares.keys() - set(model.tasks)):
            raise UserError(f"--weights: found task {unknown[0]!r}, the bank's tasks are {', '.join(model.tasks)}")
        fixed = torch.tensor([[shares.get(task, 0.0) for task in model.tasks]]).expand(len(texts), -1)
    return gap_between(model.next_token_logits(texts, routed), model.next_token_logits(texts, fixed))


def import_adapter(
    adapter: Path,
    dest: Path,
    task: str,
    sample: Path,
    *,
    column: str,
    onto: str | None,
    labels: list[str] | None,
    question: str | None,
    base: str | None,
    tracking_uri: str | None,
) -> Iterator[str]:
    """Make a bank of a PEFT LoRA, alone or on top of another bank, and say what was written.

    Raises:
        UserError: not a LoRA that a bank can hold, layers that differ from the bank's, no statistics in the bank.
    """
    from amlora_dist.inference.import_peft import check_options
    from amlora_dist.registry.exports import vacant
    from amlora_dist.registry.peft_adapters import read_peft

    check_options(task, labels)
    check_folder(dest, "DEST")
    vacant(dest)
    texts = _texts(sample, column)
    with _discarded(dest), stdout_to_stderr():
        made, config = read_peft(adapter, task)
        if not (base or onto or config.get("base_model_name_or_path")):
            raise UserError(f"{adapter}: its configuration names no base model; say which one with --base")
        source = base or str(config.get("base_model_name_or_path") or "")
        bank = _import(made, texts, dest, onto=onto, labels=labels, question=question, source=source,
                       revision=None if base else config.get("revision"), base=base, tracking_uri=tracking_uri)  # fmt: skip
    yield f"bank of {len(bank)} adapters, {task!r} with statistics of {len(texts)} texts, is in {dest}"


@contextmanager
def _discarded(folder: Path) -> Iterator[None]:
    """What cannot be finished leaves no folder behind."""
    from amlora_dist.registry.exports import discard

    try:
        yield
    except BaseException:
        discard(folder)
        raise


def _import(
    made: Adapter,
    texts: list[str],
    dest: Path,
    *,
    onto: str | None,
    labels: list[str] | None,
    question: str | None,
    source: str,
    revision: str | None,
    base: str | None,
    tracking_uri: str | None,
) -> list[str]:
    from amlora_dist.base_model import ModelSettings, resolve_base
    from amlora_dist.config.loading import home
    from amlora_dist.inference.import_peft import add_adapter, check_joinable, empty_manifest
    from amlora_dist.inference.loading import resolve_bank_base
    from amlora_dist.registry.bank_folder import read_bank
    from amlora_dist.tasks.prompts import BANK_TEMPLATE
    from amlora_dist.tasks.task_entry import TaskEntry

    before = None if onto is None else read_bank(_local(onto, tracking_uri, statistics=True))
    if before is not None:
        check_joinable(before, made)
    if before is None:
        found = resolve_base(ModelSettings(source=source, revision=revision), home())
        draft = empty_manifest(found)
    else:
        found, draft = resolve_bank_base(before.manifest.base, base), before.manifest
    entry = TaskEntry(question=question, labels=labels, template=BANK_TEMPLATE)
    return add_adapter(dest, found, draft, before, made, texts, entry).tasks


def _bank_alone(bank: str, options: dict[str, Any]) -> Bank:
    """A bank without its base model."""
    from amlora_dist.registry.bank_folder import read_bank

    with stdout_to_stderr():
        return read_bank(_local(bank, options.get("tracking_uri")), statistics=False)


def _local(bank: str, tracking_uri: str | None, *, statistics: bool = False) -> Path:
    if not bank.startswith("models:"):
        return Path(bank).expanduser()
    from amlora_dist.config.loading import home
    from amlora_dist.registry.pulling import pull_home
    from amlora_dist.registry.store import Store

    store = Store.open(home(), tracking_uri, reads=True)
    version = store.resolve(bank)
    folder = pull_home(store, version, home() / "banks")
    return store.pull_version(version, folder) if statistics else folder


def _shares(given: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for text in given:
        task, equals, number = text.rpartition("=")
        if task in found:
            raise UserError(f"--weights: found {task!r} twice, expected each task once")
        try:
            found[task] = float(number)
        except ValueError:
            equals = ""
        if not equals or not task or not abs(found[task]) <= MOST_WEIGHT:
            raise UserError(
                f"--weights: found {text!r}, expected TASK=WEIGHT, such as helpdesk/email_route=0.5, of at most"
                f" {MOST_WEIGHT}"
            )
    return found


def _texts(sample: Path, column: str) -> list[str]:
    """Texts of the first rows of a sample."""
    with opened(str(sample), column) as rows:
        texts = [line.text for line in itertools.islice(rows.lines(asked=[column]), SAMPLE_ROWS)]
    if not texts:
        raise UserError(f"{sample}: found no text, expected some; put the task's texts there")
    return texts
