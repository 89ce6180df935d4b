"""Banks from the command line: ``versions``, ``pull``, ``push``, ``diff``, ``alias``, ``promote``, ``verify``, ``prune``,
``export``, ``import-peft``, ``ask``, ``chat``, ``score``, ``rekey``, ``generate``, ``classify``. The work is in
``amlora_dist``, ``pipelines.cli.bank_output`` and ``pipelines.cli.scoring``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pipelines.cli.options import (
    Abstain,
    Bank,
    Base,
    BatchSize,
    Column,
    Device,
    Dtype,
    Expected,
    Format,
    Json,
    Label,
    NewFolder,
    Output,
    Quantisation,
    Question,
    RegisteredName,
    Signature,
    Source,
    Spreadsheet,
    Task,
    TrackingUri,
    Uri,
    VersionNumber,
)


def versions(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Registered model; default: list them all.", show_default=False)
    ] = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """List the versions of a registered model, with their tasks, scores and aliases; or all registered models."""
    from pipelines.cli.bank_output import show_models, show_versions

    if name is None:
        show_models(tracking_uri, as_json=as_json)
    else:
        show_versions(name, tracking_uri, as_json=as_json)


def pull(
    uri: Uri,
    dest: Annotated[Path | None, typer.Argument(help="Folder to make; default: NAME-VERSION.", show_default=False)] = None,
    statistics: Annotated[bool, typer.Option(help="Fetch what only further training needs, too.")] = False,
    require_signature: Signature = None,
    expect_digest: Expected = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Make a self-contained folder of a version; what an interrupted pull has fetched is not fetched again."""
    from amlora_dist.registry.signing import Trust
    from pipelines.cli.bank_output import pull_to

    trust = Trust.of(require_signature, expect_digest)
    typer.echo(pull_to(uri, dest, tracking_uri, statistics=statistics, trust=trust))


def push(
    bank: Bank,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it; default: private.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base model for the card, where the bank's source is none.")
    ] = None,
    statistics: Annotated[bool, typer.Option(help="Send what only further training needs, too.")] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Push a bank to the Hugging Face Hub, never its base model; `amlora pull hf://REPO` gets it back."""
    from pipelines.cli.bank_output import push as push_bank

    message = push_bank(bank, repository, tracking_uri, public=public, base_model=base_model, statistics=statistics)
    typer.echo(message)


def diff(
    first: Annotated[str, typer.Argument(metavar="V1", help="models:/NAME/VERSION or a folder.", show_default=False)],
    second: Annotated[str, typer.Argument(metavar="V2", help="models:/NAME/VERSION or a folder.", show_default=False)],
    sample: Annotated[
        Path | None, typer.Option(help="Texts to ask both: whose answers change, and to what.", show_default=False)
    ] = None,
    column: Column = "text",
    base: Base = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """What two banks differ in: base model, tasks, adapters, router, scores; with --sample, which answers."""
    from pipelines.cli.bank_output import show_difference
    from pipelines.cli.scoring import Rows, answer_differences

    if sample is None:
        show_difference(first, second, tracking_uri, as_json=as_json)
        return
    options = {"base": base, "tracking_uri": tracking_uri}
    answer_differences(first, second, Rows(str(sample), column), 8, options, as_json=as_json)


def ask(
    bank: Bank,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Plain texts, each in quotes.", show_default=False)
    ] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TEXT, once for each part of one text, in place of TEXT.", show_default=False),
    ] = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    abstain: Abstain = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Answer some plain texts, or one text in named parts: the answer, the task that each was routed to, how sure it is."""
    from pipelines.cli.scoring import ask as ask_bank

    options = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation,
               "tracking_uri": tracking_uri, "abstain": abstain}  # fmt: skip
    ask_bank(bank, texts or [], field or [], options, as_json=as_json)


def chat(
    bank: Bank,
    system: Annotated[str | None, typer.Option(help="The system's turn; default: the task's own, or none.")] = None,
    task: Task = None,
    route_by: Annotated[
        Literal["turn", "conversation"],
        typer.Option(help="turn: each turn is routed again; conversation: the first one's route is kept."),
    ] = "turn",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: what the task needs.")] = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Talk to a bank: every line is a turn, answered with its route; /new begins again, /quit leaves."""
    from pipelines.cli.conversation import converse

    options = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation, "tracking_uri": tracking_uri}
    converse(
        bank, options, system=system, task=task, route_by=route_by, max_new_tokens=max_new_tokens, as_json=as_json
    )


def score(
    bank: Bank,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Rows of text and right answer.", show_default=False)],
    task: Annotated[str, typer.Option(help="The rows' task, which the bank does not get.", show_default=False)],
    column: Column = "text",
    label: Label = "label",
    batch_size: BatchSize = 8,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    abstain: Abstain = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Score rows of your own at any version, as plain text: accuracy, routing, and each kind of evidence."""
    from pipelines.cli.scoring import Rows
    from pipelines.cli.scoring import score as score_bank

    options = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation,
               "tracking_uri": tracking_uri, "abstain": abstain}  # fmt: skip
    score_bank(bank, Rows(data, column, label), task, batch_size, options, as_json=as_json)


def alias(
    name: RegisteredName,
    version: VersionNumber,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as champion.", show_default=False)],
    require_signature: Signature = None,
    expect_digest: Expected = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Point an alias at a version."""
    from amlora_dist.registry.signing import Trust
    from pipelines.cli.bank_output import point

    typer.echo(point(name, version, alias, tracking_uri, Trust.of(require_signature, expect_digest)))


def promote(
    name: RegisteredName,
    version: VersionNumber,
    sample: Annotated[
        Path, typer.Option(help="Rows of text, task and right answer that both versions are scored on.", show_default=False)
    ],
    alias: Annotated[str, typer.Option(help="To move, if the version passes.")] = "champion",
    require: Annotated[
        list[str] | None,
        typer.Option(help="Such as 'accuracy[TASK] >= 0.6', or routing_accuracy; without [TASK] the mean. Again for more."),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Share of a task's rows by which it may be worse than the version it replaces.")
    ] = 0.02,
    column: Column = "text",
    label: Label = "label",
    batch_size: BatchSize = 8,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    require_signature: Signature = None,
    expect_digest: Expected = None,
    tracking_uri: TrackingUri = None,
    as_json: Json = False,
) -> None:
    """Point an alias at a version if it passes, as served, and is not worse than the one it replaces; exit code 5 if not."""
    from pipelines.cli.promotion import Promotion
    from pipelines.cli.promotion import promote as promote_version
    from pipelines.cli.scoring import Rows

    asked = Promotion(
        name=name, number=version, alias=alias, require=require or [], sample=Rows(str(sample), column, label),
        margin=margin, batch_size=batch_size,
    )  # fmt: skip
    options: dict[str, Any] = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation,
                               "tracking_uri": tracking_uri, "require_signature": require_signature,
                               "expect_digest": expect_digest}  # fmt: skip
    promote_version(asked, options, as_json=as_json)


def verify(bank: Bank, tracking_uri: TrackingUri = None) -> None:
    """Read every part of a bank and compare it with its digest; a version is fetched as a whole for that."""
    from pipelines.cli.bank_output import verify_bank

    typer.echo(verify_bank(bank, tracking_uri))


def prune(
    name: RegisteredName,
    numbers: Annotated[
        list[int] | None,
        typer.Argument(metavar="[VERSION]...", help="Default: those that do not count.", show_default=False),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only say what would be deleted.")] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Delete versions that nothing refers to: no alias, no other version, no run at work.

    A run that is started again trains a stage again whose version was deleted.
    """
    from pipelines.cli.bank_output import prune_versions

    for line in prune_versions(name, numbers or None, tracking_uri, yes=yes):
        typer.echo(line)


def export(
    bank: Bank,
    dest: NewFolder,
    format: Annotated[  # noqa: A002 (the option's name)
        Literal["peft", "merged", "top1", "vllm", "gguf"], typer.Option(help="What to make of the bank.")
    ] = "peft",
    weights: Annotated[
        list[str] | None, typer.Option(help="merged: TASK=WEIGHT, once for each task.", show_default=False)
    ] = None,
    sample: Annotated[
        Path | None, typer.Option(help="Texts to measure the gap to the mixture on (merged and top1 need some).")
    ] = None,
    column: Column = "text",
    served_base: Annotated[
        str | None, typer.Option(help="vllm: folder or Hub id that vLLM serves as --model; default: the bank's.")
    ] = None,
    bucket: Annotated[
        str | None, typer.Option(help="vllm: s3://... where DEST/adapters will lie, for Ray Serve LLM.")
    ] = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a bank for other tools: PEFT adapters, one merged model, one adapter a prompt, for vLLM, llama.cpp (gguf)."""
    from pipelines.cli.exports import Export, export_bank

    options = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation, "tracking_uri": tracking_uri}
    asked = Export(
        form=format, weights=weights or [], sample=sample, column=column, served_base=served_base, bucket=bucket
    )
    for line in export_bank(bank, dest, asked, options):
        typer.echo(line)


def import_peft(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of a PEFT LoRA.", show_default=False)],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="New folder for the bank.", show_default=False)],
    task: Annotated[str, typer.Option(help="Name of its task.", show_default=False)],
    sample: Annotated[Path, typer.Option(help="Texts of the task, for the router.", show_default=False)],
    onto: Annotated[
        str | None, typer.Option(help="Bank (with statistics) to add it to; default: a new one.", show_default=False)
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="A label of the task, once for each.")] = None,
    question: Question = None,
    column: Column = "text",
    base: Base = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Make an existing PEFT LoRA an adapter of a bank, with statistics for the router from a sample of its texts."""
    from pipelines.cli.exports import import_adapter

    for line in import_adapter(
        adapter, dest, task, sample, column=column, onto=onto, labels=label, question=question, base=base,
        tracking_uri=tracking_uri,
    ):  # fmt: skip
        typer.echo(line)


def generate(
    bank: Bank,
    source: Source = "-",
    output: Output = None,
    task: Task = None,
    question: Question = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default: what the tasks need.")] = None,
    column: Column = "text",
    format: Format = "auto",  # noqa: A002 (the option's name)
    spreadsheet: Spreadsheet = False,
    batch_size: BatchSize = 8,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    abstain: Abstain = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Answer texts from a file or standard input, line by line as they come; greedy, routed unless --task."""
    from pipelines.cli.batch_inference import Files, answer_texts

    options = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation,
               "tracking_uri": tracking_uri, "abstain": abstain}  # fmt: skip
    call = {"task": task, "question": question, "max_new_tokens": max_new_tokens}
    files = Files(source, output, column, format, spreadsheet)
    answer_texts(bank, files, batch_size, call, options)


def classify(
    bank: Bank,
    source: Source = "-",
    output: Output = None,
    label: Annotated[
        list[str] | None, typer.Option(help="A label to choose from, once for each; default: the task's.")
    ] = None,
    task: Task = None,
    question: Question = None,
    column: Column = "text",
    format: Format = "auto",  # noqa: A002 (the option's name)
    spreadsheet: Spreadsheet = False,
    batch_size: BatchSize = 8,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    abstain: Abstain = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """The most likely label of each text from a file or standard input: of the routed task, unless --label or --task."""
    from pipelines.cli.batch_inference import Files, classify_texts

    options = {"base": base, "device": device, "dtype": dtype, "quantisation": quantisation,
               "tracking_uri": tracking_uri, "abstain": abstain}  # fmt: skip
    call = {"labels": label or None, "task": task, "question": question}
    files = Files(source, output, column, format, spreadsheet)
    classify_texts(bank, files, batch_size, call, options)


def rekey(
    bank: Bank,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write.", show_default=False)],
    rows: Annotated[
        list[str],
        typer.Option(
            help="TASK=FILE, once for each task of the bank; rows that no adapter has trained on are best.",
            show_default=False,
        ),
    ],
    label: Label = "label",
    base: Base = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Give a bank of before 0.2 a router for plain text, made of rows, or any routed bank another one; its adapters stay as
    they are.

    The new router has a background, so that --abstain works, and abstains where the bank did. The weight of the keys'
    evidence is fitted on a tenth of each task's rows (at least 24, at most a quarter): rows that an adapter has trained on
    flatter the model there, and the keys get too little weight.
    """
    from pipelines.cli.scoring import rekey_bank

    typer.echo(rekey_bank(bank, dest, rows, label, {"base": base, "tracking_uri": tracking_uri}))


COMMANDS: tuple[Callable[..., None], ...] = (
    versions, pull, push, diff, alias, promote, verify, prune, export, import_peft, ask, chat, score, rekey, generate,
    classify,
)  # fmt: skip
