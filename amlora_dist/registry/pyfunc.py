"""MLflow's way in: ``mlflow.pyfunc.load_model("models:/NAME@ALIAS").predict(frame)``.

MLflow downloads the version's own folder and calls ``_load_pyfunc`` with it; the adapters it refers to are then
fetched from where the manifest says, and checked by digest. The tracking server is the one MLflow is set to.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.errors import BankError, UserError
from amlora_dist.evaluation.field_columns import FIELDS, FieldColumns
from amlora_dist.evaluation.field_texts import RefusedTextsError
from amlora_dist.registry import transfer
from amlora_dist.registry.bank_folder import check_files, check_list
from amlora_dist.registry.connection import connect
from amlora_dist.registry.manifest import Stored, read_manifest
from amlora_dist.registry.runs import Runs
from amlora_dist.tasks.conversations import FIRST_COLUMNS, BadTurnsError, Turn, known_columns, waiting_turns
from amlora_dist.tasks.texts import TAKEN, NoTextError, text_of

if TYPE_CHECKING:
    from amlora_dist.inference.model import AMLoRAModel

log = logging.getLogger(__name__)


class BankModel:
    """What MLflow wraps: ``predict`` on a data frame with a column ``text``, or those of fields or of conversations."""

    def __init__(self, model: AMLoRAModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """One answer for each row, given plain text or a conversation: as ``evaluation.prompts: served`` scores it. The rows
        of banks of prompt format 1 were scored behind their own task's prompt, which can tell more than a plain text.

        Args:
            model_input: a pandas.DataFrame with a column ``text``, or ``messages`` (lists of turns) or another form of
                conversation (``conversations.FORMS``), whose last turn of the assistant's is left out, or the fields of a
                text, by name in ``fields`` or each in a column of its name; and optionally ``question`` (asked of the text)
                and ``task`` (whose row and prompt are used; empty: the router decides).
            params: ``max_new_tokens``; 0: what the bank's tasks need.

        Raises:
            UserError: there is no such column, a row has neither a text (``texts.text_of``) nor fields nor a conversation,
                or the bank has no such task; a row that its task cannot be asked for want of fields.
        """
        fields = FieldColumns(self.model.prompter.learned)
        columns = [str(name) for name in getattr(model_input, "columns", ())]
        forms = [name for name in FIRST_COLUMNS if name in columns]
        parts = [name for name in (FIELDS, *fields.names) if fields.names and name in columns]
        if "text" not in columns and not forms and not parts:
            more = f", or a task's fields ({fields.shown})" if fields.names else ""
            raise UserError(
                f"predict: found columns {columns or type(model_input).__name__}, expected a pandas.DataFrame with a column"
                f" 'text', or one of {', '.join(FIRST_COLUMNS)}{more}"
            )
        texts: list[Any] = _texts(model_input, "text") if "text" in columns else [None] * len(model_input)
        options: dict[str, Any] = {
            name: _texts(model_input, name) for name in ("question", "task") if name in model_input.columns
        }
        if forms:
            turns = _conversations(model_input, [text is None for text in texts])
            texts = [text if text is not None else talk for text, talk in zip(texts, turns, strict=True)]
        if parts:
            texts = _with_fields(model_input, parts, fields, texts, options)
        if missing := [place for place, text in enumerate(texts) if text is None]:
            more = f", nor the fields of a task ({fields.shown})" if parts else ""
            raise UserError(f"predict: row {missing[0]} of {len(texts)} has no text{more}")
        if limit := int((params or {}).get("max_new_tokens") or 0):
            options["max_new_tokens"] = limit
        try:
            return self.model.predict(texts, **options)
        except RefusedTextsError as error:
            place = min(error.refused)
            raise UserError(f"predict: row {place} of {len(texts)}: {error.refused[place]}") from None


def _with_fields(
    frame: Any, parts: list[str], fields: FieldColumns, texts: list[Any], options: dict[str, Any]
) -> list[Any]:
    """The texts of the rows, with the fields of those that bring some in their places; columns that are fields of a row's
    text are none of its ``options``."""
    for name in parts:
        _once(frame, name)
    columns = {name: frame[name].tolist() for name in parts}
    made = []
    for place, text in enumerate(texts):
        values = {name: _plain(cells[place]) for name, cells in columns.items()}
        task = (options.get("task") or {}) and options["task"][place]
        try:
            if text is not None and not isinstance(text, str):
                if fields.meant(values):
                    raise UserError("fields: found some next to a conversation, expected one of them; leave one out")
                found = None
            else:
                found = fields.of(values, "text", text, task or None)
        except UserError as error:
            raise UserError(f"predict: row {place} of {len(texts)}: {error}") from None
        made.append(text if found is None else found[1])
        for name in options.keys() & (found or ("", {}))[1].keys():
            options[name][place] = None
    return made


def _conversations(frame: Any, wanted: list[bool]) -> list[tuple[Turn, ...] | None]:
    """The turns of the rows that are ``wanted``; None for the others, and for rows with nothing in any such column."""
    columns = {name: frame[name].tolist() for name in known_columns() if name in frame.columns}
    found: list[tuple[Turn, ...] | None] = []
    for place, on in enumerate(wanted):
        values = {name: listed for name, cells in columns.items() if (listed := _plain(cells[place])) is not None}
        try:
            found.append(waiting_turns(values)[0] if on and values else None)
        except BadTurnsError as error:
            raise UserError(f"predict: row {place} of {len(wanted)}: found {error}") from None
    return found


def _plain(value: Any) -> Any:
    """A cell of a frame as JSON would have it: lists in place of arrays, None for what is missing."""
    if hasattr(value, "tolist") and getattr(value, "ndim", False):
        return value.tolist()
    return None if type(value).__name__ in ("NAType", "NaTType") or value != value else value


def _once(frame: Any, name: str) -> None:
    if list(frame.columns).count(name) > 1:
        raise UserError(f"predict: found the column {name!r} twice, expected it once")


def _texts(frame: Any, name: str) -> list[str | None]:
    """A column's values; None for what is empty or missing (None, NaN, NA).

    Raises:
        UserError: a value that is no text, or two columns of that name.
    """
    _once(frame, name)
    values = frame[name].tolist()
    found: list[str | None] = []
    for place, value in enumerate(values):
        missing = value is None or type(value).__name__ in ("NAType", "NaTType") or (value != value) is True
        try:
            text = "" if missing else text_of(value)
        except NoTextError as error:
            raise UserError(
                f"predict: row {place} of {len(values)}, column {name!r}: found {error}, expected a text ({TAKEN})"
            ) from None
        found.append(text if text.strip() else None)
    return found


def complete(folder: Path, dest: Path) -> Path:
    """Make ``dest`` the whole bank of a version's folder as MLflow downloads it; see ``Store.pull``.

    ``folder`` is only read: in a serving container it may be read-only.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    check_list(folder, manifest)
    store: Runs | None = None

    def fetch(path: str, stored: Stored | None, target: Path) -> None:
        nonlocal store
        target.parent.mkdir(parents=True, exist_ok=True)
        if (folder / path).is_file():
            shutil.copyfile(folder / path, target)
            return
        if stored is None:
            raise BankError(f"{folder / path}: missing, and the manifest does not say where it is stored")
        store = store or _tracking_store(dest.parent)
        transfer.fetch_file(store, path, stored, target, (manifest.files or {}).get(path))

    part = dest.with_name(f".{dest.name}.part")
    return transfer.assemble(manifest, part, dest, fetch, statistics=False)


def _tracking_store(home: Path) -> Runs:
    """The store that MLflow itself is set to."""
    import mlflow

    return Runs(connect(home, mlflow.get_tracking_uri()))


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> BankModel:
    """Called by MLflow with the local folder of a version.

    Args:
        path: of the folder.
        model_config: ``base``, ``device``, ``dtype`` and ``quantisation`` of ``AMLoRAModel.from_bank``; empty ones are the
            defaults.
    """
    from amlora_dist.inference.model import AMLoRAModel

    options = {key: value for key, value in (model_config or {}).items() if value}
    with tempfile.TemporaryDirectory(prefix="amlora-bank-") as tmp:
        whole = complete(Path(path), Path(tmp) / "bank")
        return BankModel(AMLoRAModel.from_bank(whole, **options))
