"""The store from the command line: ``backup``, ``restore`` and ``sign``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.options import NewFolder, TrackingUri

if TYPE_CHECKING:
    from collections.abc import Callable


def backup(
    dest: NewFolder,
    storage: Annotated[bool, typer.Option("--storage", help="Copy trained stages too, not only what is published.")] = False,
) -> None:
    """Copy the store in AMLORA_HOME (journal, banks, results) to a folder, while runs go on."""
    from amlora_dist.config.loading import home
    from amlora_dist.registry import backup as store
    from pipelines.cluster.resources import check_folder

    check_folder(dest, "DEST")
    _check_in_use(home())
    made = store.backup(home(), dest, storage=storage)
    typer.echo(f"{made.files} files, {made.size} bytes, are in {made.folder}")


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="Folder that backup made.", show_default=False)],
) -> None:
    """Make AMLORA_HOME, which must be empty or not there, of a backup; every file is checked."""
    from amlora_dist.config.loading import home
    from amlora_dist.registry import backup as store
    from pipelines.cluster.resources import check_folder

    check_folder(home())
    made = store.restore(source, home())
    typer.echo(f"{made.files} files, {made.size} bytes, are in {made.folder}; runs go on with their run ids")


def sign(
    bank: Annotated[
        str, typer.Argument(metavar="BANK", help="models:/NAME/VERSION or a folder.", show_default=False)
    ],
    key: Annotated[Path, typer.Option(help="PEM of an elliptic curve's private key.", show_default=False)],
    tracking_uri: TrackingUri = None,
) -> None:
    """Sign a whole bank with a private key (Sigstore's model-signing, without a network)."""
    from pipelines.cli.bank_output import sign_bank

    typer.echo(sign_bank(bank, key, tracking_uri))


def _check_in_use(home: Path) -> None:
    """Refuse to back up a store that is not the one which commands use here."""
    from amlora_dist.errors import UserError
    from amlora_dist.privacy import shown
    from amlora_dist.registry.connection import VARIABLE, store_uri
    from amlora_dist.registry.places import DATABASE

    where, uri = store_uri(home, None)
    if where == VARIABLE and Path(uri.removeprefix("sqlite:///")).resolve() != (home / DATABASE).resolve():
        raise UserError(
            f"{VARIABLE}: found {shown(uri)}, which is backed up with its own tools; unset it to back up the store in {home}"
        )


COMMANDS: tuple[Callable[..., None], ...] = (backup, restore, sign)
