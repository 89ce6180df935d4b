"""What a stage is to do, as plain data: it travels to the workers and lies next to the stage's results."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from amlora_dist.base_model import BaseModel, ModelSettings, resolve_base
from amlora_dist.errors import UserError
from amlora_dist.tasks.sources import TaskData, load_task
from amlora_dist.tasks.task import TaskSpec, read_mapping
from amlora_dist.tasks.task_entry import TaskEntry, task_entry
from amlora_dist.training.remote_storage import RemoteCheckpoints, RemoteStorage
from amlora_dist.training.result import is_whole
from amlora_dist.training.settings import StageSettings

Mode = str
"""``untrained``, ``router``, ``oracle`` (told the task), ``own`` (as ``router``, but each row behind its own task's prompt,
which tells the task), ``without.N``: as ``router``, the Nth adapter disabled, or ``choice``: as ``router``, of rows that
decide how plain text is answered (``evaluation.plain_choice``)."""
CHOICE = "choice"
WITHOUT = "without."


def is_plain(mode: Mode) -> bool:
    """Whether a score is of plain texts as the bank answers them, in whichever way it does."""
    return mode == "router" or mode.startswith(WITHOUT)


@lru_cache(maxsize=256)
def _parsed(task: str, mapping: str) -> TaskSpec:
    return read_mapping(json.loads(mapping), origin=Path(f"task {task}"))


@dataclass(frozen=True, slots=True)
class Parent:
    """An adapter of the bank below the stage: its digest, and the folder of ``training.result`` that holds it."""

    task: str
    digest: str
    folder: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One score to compute: a task and split under one way of gating."""

    task: str
    split: str
    mode: Mode
    fingerprint: str
    folder: str
    """Where predictions and summary go; whole when ``summary.json`` is there."""
    before: tuple[str, ...] = ()
    """Folders of scores of the same rows that differ from this one in nothing but the gates (``evaluation.unchanged``);
    those that are not there are passed over."""
    features: str | None = None
    """File of what the router reads of these rows."""
    places: tuple[int, ...] | None = None
    """Of the split's rows that are scored, rising; None: all."""

    @property
    def done(self) -> bool:
        return self.summary() is not None

    def summary(self) -> dict[str, Any] | None:
        """The score; None where it was not computed, or its file is damaged and has to be written again."""
        try:
            found = json.loads((Path(self.folder) / "summary.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        whole = isinstance(found, dict) and found.get("fingerprint") == self.fingerprint
        return found if whole and {"accuracy", "seconds"} <= found.keys() else None


@dataclass(frozen=True, slots=True)
class RateRace:
    """Learning rates that take the first steps of a stage (``training.rate_race``)."""

    fingerprints: dict[str, str]
    """Rate -> training fingerprint of the stage at that rate."""
    steps: int
    """Of each."""
    published: tuple[str, ...] = ()
    """Rates at which somebody has the whole stage already: no checkpoint of them is of use."""


@dataclass(frozen=True, slots=True)
class StageWork:
    """One stage: train an adapter on top of its parents (unless it is there already), then score cells."""

    fingerprint: str
    index: int
    """1-based place of the stage's adapter in its bank."""
    task: str
    folder: str
    """Absolute; ``trained/``, ``checkpoints/`` and ``progress.jsonl`` go here."""
    settings: StageSettings
    base: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    """Specifications by name, of the task to learn and of all that are scored."""
    data_seed: int
    data_dir: str | None
    parents: list[Parent]
    cells: list[Cell]
    deepspeed: dict[str, Any]
    evaluation_batch_size: int
    rows: dict[str, int | None] = field(default_factory=dict)
    """Tasks whose training rows the stage learns from, and how many of each at most; default: its own, all of them."""
    mixed: dict[str, int] = field(default_factory=dict)
    """Other tasks of which so many training rows are among the stage's own, unknown to it (``boundary_mix``)."""
    data_digests: dict[str, str] = field(default_factory=dict)
    """``<task>/<split>`` -> digest of the rows as the driver saw them; a node with other data is refused."""
    plain_texts: bool = False
    """Score rows as plain texts, through the function that serves them, where the bank's router can."""
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the parent bank says of its tasks, by name: a text may be routed to them."""
    sealed: tuple[str, ...] = ()
    """Splits that must not be opened."""
    cache: str = ""
    """Folder of files that may be deleted at any time; absolute, on any node its own."""
    root: str = ""
    """The folder below which all others lie; absolute."""
    url: str | None = None
    """Where checkpoints are copied to, if nodes share no folder (``training.remote_storage``)."""
    apart: bool = False
    """Whether workers have folders of their own: then what is finished goes to ``url`` too, and comes from there."""
    race: RateRace | None = None
    """Nothing but the beginnings of the stage at several learning rates."""
    stop_in: str | None = None
    """Folder in which the stop file appears; default: ``folder``."""
    taken: Parent | None = None
    """The stage's adapter, which somebody has trained: its statistics alone are made."""

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def trained(self) -> Path:
        """The result of training; whole when ``COMMIT`` is there."""
        return self.path / "trained"

    @property
    def adapters(self) -> list[Parent]:
        """Adapters that were there before the stage."""
        return [*self.parents, *([] if self.taken is None else [self.taken])]

    @property
    def is_trained(self) -> bool:
        return is_whole(self.trained)

    @property
    def race_file(self) -> Path:
        """What a race comes to."""
        return self.path / "race.json"

    @property
    def copies(self) -> RemoteStorage | None:
        """Copies of what is finished; None where driver and workers read the same folders."""
        return RemoteStorage(self.url, Path(self.root)) if self.url is not None and self.apart else None

    @property
    def remote_checkpoints(self) -> RemoteCheckpoints | None:
        """Copies of this stage's checkpoints."""
        return None if self.url is None else RemoteStorage(self.url, Path(self.root)).checkpoints(self.path)

    def progress(self) -> tuple[int, int]:
        """How far it has come: optimizer steps in committed checkpoints, and cells scored. A race: of all rates."""
        if self.race is not None:
            newest: dict[str, int] = {}
            for mark in self.path.glob("rate-*/checkpoints/step-*/COMMIT"):
                rate, step = mark.parts[-4], int(mark.parent.name.removeprefix("step-"))
                newest[rate] = max(step, newest.get(rate, 0))
            return sum(newest.values()), 0
        names = [mark.parent.name for mark in self.path.glob("checkpoints/step-*/COMMIT")]
        if self.apart and self.remote_checkpoints is not None:
            names += self.remote_checkpoints.committed()
        steps = [int(name.removeprefix("step-")) for name in names]
        return max(steps, default=0), sum(cell.done for cell in self.cells) + self.is_trained

    def upload(self) -> None:
        """From the driver: copy what workers need who have folders of their own."""
        if (copies := self.copies) is not None:
            for folder in [Path(one.folder) for one in self.adapters] + [self.trained] * self.is_trained:
                copies.upload(folder)

    def fetch(self) -> None:
        """To the driver: fetch what such workers have made."""
        if (copies := self.copies) is not None:
            if self.race is not None:
                copies.fetch(self.race_file, self.race_file.is_file)
                return
            copies.fetch(self.trained, partial(is_whole, self.trained))
            for cell in self.cells:
                copies.fetch(Path(cell.folder), partial(getattr, cell, "done"))

    def moved(self, root: Path, cache: Path) -> StageWork:
        """The same work on a node whose own folder is ``root``."""

        def here(path: str) -> str:
            return str(root / Path(path).relative_to(self.root))

        cells = [
            replace(
                cell,
                folder=here(cell.folder),
                before=tuple(here(folder) for folder in cell.before),
                features=None if cell.features is None else here(cell.features),
            )
            for cell in self.cells
        ]
        parents = [replace(parent, folder=here(parent.folder)) for parent in self.parents]
        taken = None if self.taken is None else replace(self.taken, folder=here(self.taken.folder))
        return replace(
            self, folder=here(self.folder), parents=parents, taken=taken, cells=cells, cache=str(cache), root=str(root)
        )

    def base_model(self) -> BaseModel:
        """The base model, in the folder where the driver found it; where nodes share none, brought to this node.

        Raises:
            UserError: this node has no such folder, or another model.
        """
        path, source = Path(self.base["path"]), str(self.base["source"])
        if (path / "config.json").is_file():
            return BaseModel(**{**self.base, "path": path})
        from_hub = path.parent.name == "snapshots"
        if not self.apart or not (from_hub or source.startswith("package:")):
            raise UserError(
                f"model.source: {source!r} lies in {path} where the driver runs, and node {platform.node()} has"
                " nothing there; put it into a folder that all nodes share: for a model from the Hub set HF_HOME to one on"
                " every node, for a package's AMLORA_HOME"
            )
        commit = path.name if from_hub else None
        home = Path(self.root).parent  # of a node that has a folder of its own
        settings = ModelSettings(source=source, revision=commit, quantisation=self.base.get("quantisation", "none"))
        found = resolve_base(settings, home)
        if found.digest != self.base["digest"]:
            raise UserError(
                f"model.source: {source!r} has digest {found.digest[:12]} on node {platform.node()}, where the driver runs"
                f" {self.base['digest'][:12]}; use one image on all nodes"
            )
        return found

    def entry(self, task: str) -> TaskEntry | None:
        """Labels and prompt of a task of the bank; None where nobody knows them."""
        if task in self.tasks:
            return task_entry(self.spec(task))
        return TypeAdapter(TaskEntry).validate_python(self.entries[task]) if task in self.entries else None

    def spec(self, task: str) -> TaskSpec:
        """Specification of a task; parsed once in a process, and nobody's to change."""
        return _parsed(task, json.dumps(self.tasks[task]))

    def data(self, task: str, splits: tuple[str, ...]) -> TaskData:
        """The rows of a task, which must be those the driver saw.

        Raises:
            UserError: this node reads other rows than the driver did.
        """
        spec = self.spec(task)
        data_dir = Path(self.data_dir) if self.data_dir else None
        data = load_task(spec, seed=self.data_seed, data_dir=data_dir, splits=splits, sealed=self.sealed)
        for split in splits:
            expected = self.data_digests.get(f"{task}/{split}")
            if expected is not None and data.digest(split) != expected:
                raise UserError(
                    f"task {task!r}, split {split}: this node reads other rows (digest {data.digest(split)[:12]}) than"
                    f" the driver did ({expected[:12]}); data_dir must be the same files on every node"
                )
        return data

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StageWork:
        return TypeAdapter(cls).validate_json(text)
