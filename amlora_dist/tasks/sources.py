"""Rows of a task: read, checked, sampled, and named by a digest of what is used.

A row counts the same whether it came from the Hub, a local file or a mirror: its text is put together from the same
fields, and its label is the verbaliser. Rows are kept in an order of their own content, so that neither the order in
a file nor the place it came from changes a result.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from amlora_dist.config.schema import meant
from amlora_dist.digests import value_digest
from amlora_dist.errors import FaultsError, UserError
from amlora_dist.tasks.auto_labels import with_found_labels
from amlora_dist.tasks.bad_rows import (
    DUPLICATE,
    EMPTY_TEXT,
    MISSING_ANSWER,
    MISSING_LABEL,
    UNKNOWN_LABEL,
    BadRow,
    faults_of,
    remarks_on,
)
from amlora_dist.tasks.conversations import BadTurnsError, Turn, joined, last_user, recognised, turns_of
from amlora_dist.tasks.files import RawRow
from amlora_dist.tasks.named_fields import joined_fields, parts_of
from amlora_dist.tasks.prompts import compile_template, render_value, template_faults, template_for
from amlora_dist.tasks.readers import read_split
from amlora_dist.tasks.task import (
    SPLITS,
    Columns,
    TaskDefaults,
    TaskSpec,
    TextField,
    mirror_folder,
    placed,
    plain_value,
    with_defaults,
)
from amlora_dist.tasks.texts import NoTextError, is_blank, text_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One example. ``number`` counts from 1 in its source; ``fields`` are the parts of ``text`` without markers."""

    number: int
    fields: dict[str, str]
    text: str
    label: str | None
    """The label's first value in the data; None for free text."""
    target: str
    """What the model should answer: the label's text, or the free-text answer."""
    turns: tuple[Turn, ...] = ()
    """Of a conversation in the chat format: all of it, the answer's turn last. ``text`` is the user's last turn."""
    references: tuple[str, ...] = ()
    """Of free text: further right answers next to ``target``; the best counts, and none of them is trained on."""

    @property
    def key(self) -> str:
        """sha256 of text and answers: the row, wherever it is."""
        turns = (part for turn in self.turns for part in (turn.role, turn.text))
        return _sha(self.text, self.target, *turns, *self.references)

    @property
    def shown(self) -> str:
        """What is before the answer, by which duplicates are found."""
        return "\0".join([self.text, *(f"{turn.role}\0{turn.text}" for turn in self.turns[:-1])])


@dataclass(slots=True)
class TaskData:
    """The rows of a task that are used, by split, and those that are not."""

    spec: TaskSpec
    rows: dict[str, list[Row]]
    bad: list[BadRow] = field(default_factory=list)
    took: str = ""
    """Of ``columns: auto``: the columns that were recognised."""

    @property
    def remarks(self) -> str:
        """What was left out and why, in one line for the terminal; empty where nothing was."""
        return remarks_on(self.bad, self.spec.name)

    def digest(self, split: str) -> str:
        """sha256 over the used rows of a split: after limits and filters, without regard to order or origin."""
        return value_digest(sorted(row.key for row in self.rows[split]))


def load_task(
    spec: TaskSpec,
    *,
    defaults: TaskDefaults | None = None,
    seed: int = 0,
    data_dir: Path | None = None,
    splits: Sequence[str] = SPLITS,
    sealed: Sequence[str] = (),
) -> TaskData:
    """Read the rows of a task.

    With a row limit N, at most N rows are kept, spread over the labels as evenly as the data allow. Which ones depends
    on ``seed`` and the rows' content alone; a smaller limit keeps a subset of a larger one.

    Args:
        spec: a task from ``resolve_task``, or one whose open settings ``defaults`` fill in.
        seed: of the sample, unless the task pins its own.
        data_dir: local mirrors that stand in for Hub data sets: ``<data_dir>/<task>/<split>.jsonl`` with ``text`` and
            ``label`` (the verbaliser) in each row, or a conversation's own columns.
        splits: which to return. All are read, because duplicates between them are looked for; but for the test split
            alone, from which no row is taken out.
        sealed: splits that are not even opened: a search must not see the test rows.

    A training row whose text is in an evaluation split, and a dev row whose text is in the test split, are left out
    and counted. ``labels: auto`` is replaced, in the specification of what this returns, by what the training rows have.

    Raises:
        FaultsError: bad rows, with files and row numbers, unless ``on_bad_row: skip``; too many texts in two splits.
        UserError: missing files or columns, a split without rows, a template that cannot be rendered.
    """
    spec = placed(with_defaults(spec, defaults or TaskDefaults()), data_dir)
    if faults := template_faults(spec):
        raise FaultsError(spec.origin or f"task {spec.name!r}", faults)
    mirror = mirror_folder(spec, data_dir) if data_dir is not None and spec.source.kind == "hub" else None
    if spec.labels == "auto":
        spec = with_found_labels(spec, read_split(spec, "train", mirror=mirror) or (), mirrored=mirror is not None)
    maker = _RowMaker(spec, mirrored=mirror is not None)
    if spec.source.kind == "data_dir":
        mirror = _suite_folder(spec, data_dir)
    found: dict[str, list[tuple[Row, str]]] = {}
    bad: list[BadRow] = []
    needed = ("test",) if tuple(splits) == ("test",) else SPLITS
    for split in (one for one in needed if one not in sealed):
        raws = read_split(spec, split, mirror=mirror)
        if raws is not None:
            found[split] = _good_rows(raws, split, maker, bad)
    if "dev" not in found and "train" in found:
        found["train"], found["dev"] = _held_out(found["train"], spec.splits.dev_rows)
    read = {split: len(rows) for split, rows in found.items()}
    for split, others in (("train", ("test", "dev")), ("dev", ("test",))) if "train" in found else ():
        _drop_duplicates(found, split, others, bad)
    if spec.on_bad_row != "skip" and (faults := faults_of(bad, spec, read)):
        raise FaultsError(f"task {spec.name!r}", faults)
    sample_seed = seed if spec.seed is None else spec.seed
    used = {}
    for split in splits:
        limit = getattr(spec, f"max_{split}")
        used[split] = sample([row for row, _ in found[split]], limit, seed=sample_seed)
        if not used[split]:
            why = remarks_on([one for one in bad if one.split == split], spec.name).partition(": ")[2]
            raise UserError(
                f"task {spec.name!r}: split {split!r} has no usable row ({spec.origin or 'no file'}){why and f': {why}'};"
                " fix the rows or the columns of the task"
            )
        if spec.prompt.template is not None:  # one that cannot be rendered is found here, and not by a stage
            template_for(spec).render(used[split][0])
    return TaskData(spec=spec, rows=used, bad=bad, took=maker.took)


def at_hand(spec: TaskSpec, data_dir: Path | None) -> bool:
    """Whether rows of a task can be read without the network; does not look into the files."""
    spec = placed(spec, data_dir)
    if spec.source.kind == "data_dir":
        return data_dir is not None and (data_dir / spec.splits.train).is_file()
    return spec.source.kind != "hub" or data_dir is not None


def _suite_folder(spec: TaskSpec, data_dir: Path | None) -> Path:
    """Folder below which the files of a suite's task are. Raises UserError where none was given."""
    if data_dir is None:
        raise UserError(
            f"task {spec.name!r} is read from the files of its suite: give data_dir, the folder that holds"
            f" {spec.splits.train} (docs/suites.md says where to get it)"
        )
    return data_dir


def sample(rows: Sequence[Row], limit: int | None, *, seed: int) -> list[Row]:
    """At most ``limit`` rows, as even over the targets as they allow, in an order that depends on content alone."""
    ordered = sorted(rows, key=lambda row: row.key)
    if limit is None or len(rows) <= limit:
        return ordered
    by_target: dict[str | None, list[Row]] = {}
    for row in sorted(ordered, key=lambda row: _sha(str(seed), row.key)):
        by_target.setdefault(row.label, []).append(row)
    # Rounds over the labels: the k-th row of each label comes before any (k+1)-th; hashes of the seed break the
    # last round's tie, so that no label is favoured by its name.
    rounds = [
        (place, _sha(str(seed), str(label)), row) for label, own in by_target.items() for place, row in enumerate(own)
    ]
    selected = [row for _, _, row in sorted(rounds, key=lambda item: item[:2])[:limit]]
    return sorted(selected, key=lambda row: row.key)


class _RowMaker:
    """Makes a row of what a reader gives, or says why it cannot."""

    def __init__(self, spec: TaskSpec, *, mirrored: bool) -> None:
        self.spec = spec
        self.mirrored = mirrored
        self.took = ""
        self._columns: Columns = spec.columns
        self.parts = spec.columns.text
        self.answer_column = "label" if mirrored else spec.columns.label or spec.columns.answer or ""
        self._shown = parts_of(spec)
        self.names = [part.name for part in self._shown]
        self.templates = [
            None if part.value is None else compile_template(part.value, where=f"{spec.origin}: columns.text")
            for part in self.parts
        ]
        self.texts = {}
        self.values: dict[str, str] = {}
        for label in spec.known_labels:
            first = next(one.value for one in spec.known_labels if one.text == label.text)
            self.texts[label.text if mirrored else label.value] = label.text
            self.values[label.text] = first

    def row(self, raw: RawRow) -> Row | str:
        try:
            return self._row(raw)
        except _NotTextError as error:
            return str(error)
        except UserError as error:
            raise UserError(f"{raw.where}: {error}") from None

    def _conversation(self, raw: RawRow) -> Row | str:
        if self._columns.auto:  # by its first row
            named = recognised(raw.values, raw.file)
            self._columns, self.took = TypeAdapter(Columns).validate_python(named), ", ".join(named)
            log.info("task %r: columns: auto took %s", self.spec.name, self.took)
        try:
            turns = turns_of(raw.values, self._columns)
        except BadTurnsError as error:
            return str(error)
        target = turns[-1].text.strip()
        if self.spec.prompt.format == "classic":
            text = joined(turns[:-1]).strip()
            return Row(raw.number, {"text": text}, text, None, target)
        text = turns[last_user(turns)].text
        return Row(raw.number, {"text": text}, text, None, target, turns)

    def _row(self, raw: RawRow) -> Row | str:
        if self.spec.columns.conversational:
            return self._conversation(raw)
        fields = self._mirrored_fields(raw.values) if self.mirrored else self._fields(raw.values)
        text = joined_fields(fields, self._shown)
        if all(map(is_blank, fields.values())):
            return EMPTY_TEXT
        answers = self._answers(raw.values.get(self.answer_column))
        if not answers:
            return MISSING_ANSWER if self.spec.free_text else MISSING_LABEL
        answer = answers[0]
        if self.spec.free_text:
            return Row(raw.number, fields, text, None, answer, references=tuple(answers[1:]))
        target = self.texts.get(answer)
        if target is None:
            hint = meant(answer, list(self.texts))
            return f"{UNKNOWN_LABEL} ({answer[:40]!r}{hint})"
        return Row(raw.number, fields, text, self.values[target], target)

    def _answers(self, found: Any) -> list[str]:
        """The right answers that a row has, each once; of free text there may be a list of them, and of a suite's files."""
        several = isinstance(found, (list, tuple)) and (self.spec.free_text or self.spec.source.kind == "data_dir")
        listed = found if several else [found]
        answers = (_plain(one, self.answer_column) for one in listed if one is not None)
        return list(dict.fromkeys(one for one in answers if one))

    def _fields(self, values: dict[str, Any]) -> dict[str, str]:
        out = {}
        shown = {name: "" if value is None else value for name, value in values.items()}
        for name, part, template in zip(self.names, self.parts, self.templates, strict=True):
            if template is None:
                out[name] = _text(shown.get(part.column or "", ""), part.column or name).strip()
                continue
            try:
                out[name] = render_value(template, shown, where=f"{self.spec.origin}: columns.text").strip()
            except NoTextError as error:
                raise _NotTextError(f"{error} from {str(part.value)[:40]!r}") from None
        return out

    def _mirrored_fields(self, values: dict[str, Any]) -> dict[str, str]:
        """Take a mirror's text apart at the markers it was written with; whole where they are not there."""
        whole = rest = _text("" if values.get("text") is None else values["text"], "text").strip()
        out: dict[str, str] = {}
        for place, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            if part.marker and rest.startswith(f"{part.marker}:"):
                rest = rest[len(part.marker) + 1 :].lstrip()
            elif part.marker and place:
                return {self.names[-1]: whole}
            cut = _next_part(rest, self.parts[place + 1 :])
            out[name], rest = rest[:cut].strip(), rest[cut:].strip()
        return out


class _NotTextError(ValueError):
    """A row's value is no text; the message is the row's fault."""


def _text(value: object, column: str) -> str:
    try:
        return text_of(value)
    except NoTextError as error:
        raise _NotTextError(f"{error} in column {column!r}") from None


def _plain(value: object, column: str) -> str:
    """An answer in the one form that is compared, as ``plain_value`` makes it."""
    _text(value, column)
    return plain_value(value)


def _next_part(text: str, later: Sequence[TextField]) -> int:
    """Where the part after this one begins; the length of ``text`` where it does not."""
    if not later:
        return len(text)
    mark = f"\n{later[0].marker}:" if later[0].marker else "\n"
    place = text.find(mark)
    return len(text) if place < 0 else place


def _good_rows(raws: Iterator[RawRow], split: str, maker: _RowMaker, bad: list[BadRow]) -> list[tuple[Row, str]]:
    """Usable rows of a split with the file of each; the others are added to ``bad``."""
    rows = []
    for raw in raws:
        row = raw.fault or maker.row(raw)
        if isinstance(row, str):
            bad.append(BadRow(split, raw.number, row, raw.file))
        else:
            rows.append((row, raw.file))
    return rows


def _held_out(train: list[tuple[Row, str]], count: int) -> tuple[list[tuple[Row, str]], list[tuple[Row, str]]]:
    """Hold a dev split out of training rows: at most ``count`` and at most a fifth, the same for every seed.

    All copies of a text go to one side, so the cut itself makes no duplicate.
    """
    first = {row.shown: (row, file) for row, file in reversed(train)}
    most = max(1, min(count, len(first) // 5))
    chosen = {row.shown for row in sample([row for row, _ in first.values()], most, seed=0)}
    return [one for one in train if one[0].shown not in chosen], [first[text] for text in sorted(chosen)]


def _drop_duplicates(
    found: dict[str, list[tuple[Row, str]]], split: str, others: tuple[str, ...], bad: list[BadRow]
) -> None:
    """Take rows out of ``split`` whose text is also in an evaluation split."""
    seen = {row.shown: other for other in reversed(others) for row, _ in found.get(other, ())}
    selected = []
    for row, file in found[split]:
        if row.shown in seen:
            bad.append(BadRow(split, row.number, f"{DUPLICATE} {seen[row.shown]}", file))
        else:
            selected.append((row, file))
    found[split] = selected


def _sha(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
