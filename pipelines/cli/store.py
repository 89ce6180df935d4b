"""The store from the command line: ``backup``, ``restore`` and ``sign``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log lines of all libraries, tracebacks of errors.")]


def backup(
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="New folder.", show_default=False)],
    storage: Annotated[bool, typer.Option("--storage", help="Copy trained stages too, not only what is published.")] = False,
    verbose: Verbose = False,
) -> None:
    """Copy the store in AMLORA_HOME (journal, banks, results) to a folder, while runs go on."""
    from amlora_dist.config.loading import home
    from amlora_dist.registry import backup as store

    made = store.backup(home(), dest, storage=storage)
    typer.echo(f"{made.files} files, {made.size} bytes, are in {made.folder}")


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder that backup made.", show_default=False)],
    verbose: Verbose = False,
) -> None:
    """Make AMLORA_HOME, which must be empty or not there, of a backup; every file is checked."""
    from amlora_dist.config.loading import home
    from amlora_dist.registry import backup as store

    made = store.restore(source, home())
    typer.echo(f"{made.files} files, {made.size} bytes, are in {made.folder}; runs go on with their run ids")


def sign(
    bank: Annotated[
        str, typer.Argument(metavar="BANK", help="models:/NAME/VERSION or a folder.", show_default=False)
    ],
    key: Annotated[Path, typer.Option(help="PEM of an elliptic curve's private key.", show_default=False)],
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow; default: MLFLOW_TRACKING_URI, or the store in AMLORA_HOME.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Sign a whole bank with a private key (Sigstore's model-signing, without a network)."""
    from pipelines.cli.bank_output import sign_bank

    typer.echo(sign_bank(bank, key, tracking_uri))


COMMANDS: dict[str, Callable[..., None]] = {"backup": backup, "restore": restore, "sign": sign}
