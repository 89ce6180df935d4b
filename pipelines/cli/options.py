"""Options and arguments that several commands have, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides, such as training.epochs=3.", show_default=False),
]
JsonObject = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, the rest on standard error.")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output, the rest on standard error.")]
TrackingUri = Annotated[str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, or the store in AMLORA_HOME.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log lines of all libraries, tracebacks of errors.")]
RegisteredName = Annotated[str, typer.Argument(metavar="NAME", help="Registered model.", show_default=False)]
Bank = Annotated[
    str, typer.Argument(metavar="BANK", help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder.", show_default=False)
]
Uri = Annotated[
    str, typer.Argument(metavar="URI", help="models:/NAME@ALIAS, models:/NAME/VERSION or hf://OWNER/NAME[@REVISION].")
]
Source = Annotated[
    str,
    typer.Argument(
        metavar="[FILE]", help="JSON lines, CSV, Parquet or plain lines; - is standard input.", show_default=False
    ),
]
Format = Annotated[
    Literal["auto", "jsonl", "csv", "parquet", "text"],
    typer.Option(help="Of the input; auto goes by its suffix or, without one, by its first line."),
]
Spreadsheet = Annotated[
    bool, typer.Option("--spreadsheet", help="CSV whose texts no spreadsheet takes for formulas: a ' in front of = + - @.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="File for the results; default: standard output.")]
Base = Annotated[str | None, typer.Option(help="Folder or Hub id of the base model, if it is not where the bank says.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")]
Abstain = Annotated[
    float | None,
    typer.Option(
        min=0, help="Share of own rows that may be lost by giving texts of no task to the base model; 0: off.",
        show_default="as the bank was published",
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
Quantisation = Annotated[
    Literal["none", "nf4", "int8"] | None,
    typer.Option(help="Of the base model; another than the bank's answers otherwise.", show_default="the bank's own"),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts of one pass.")]
Task = Annotated[str | None, typer.Option(help="Use this task's row and prompt instead of the router.")]
Question = Annotated[str | None, typer.Option(help="Asked of every text.")]
Column = Annotated[str, typer.Option(help="Key or column of the text; `task` and `question` are read too.")]
Signature = Annotated[
    Path | None, typer.Option("--require-signature", help="PEM of the public key that must have signed the bank.")
]
Expected = Annotated[str | None, typer.Option("--expect-digest", help="The manifest's, as `amlora verify` prints it.")]
Label = Annotated[str, typer.Option(help="Key or column of the right answer.")]
VersionNumber = Annotated[int, typer.Argument(metavar="VERSION", help="Number of the version.", show_default=False)]
NewFolder = Annotated[Path, typer.Argument(metavar="DEST", help="New folder.", show_default=False)]
