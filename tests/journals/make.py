"""Makes a fixture: the home of a run that died in its third stage, as the code of today leaves it.

    python -m tests.journals.make tests/journals/schema-1.tar.xz

One archive is kept for each schema of banks and journals that was released, and none is ever made again: the test is
that newer code goes on from what older code left (or says why not). Paths, host and user names are replaced.
"""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import sqlite3
import sys
import tarfile
import tempfile
from contextlib import closing
from pathlib import Path

from amlora_dist.registry.store import Store
from tests.fork_server import Server
from tests.pipelines.crash_cases import outcome_of
from tests.tiny_config import write_config

PLACE = "/journal"
"""Stands for the folder that holds ``home`` in every text of the archive."""
RUN = ("run", "run.yaml", "--run-id", "old", "--json")
TASKS = ("colours", "shapes", "sizes")


def rewrite_texts(home: Path, before: str, after: str) -> None:
    """Replace a text in every table of the store and every JSON file of the storage."""
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in database.execute(f"PRAGMA table_info('{table}')").fetchall():
                if kind.upper().startswith(("VARCHAR", "TEXT", "CHAR")):
                    database.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE "{column}" LIKE ?',
                        (before, after, f"%{before}%"),
                    )
        database.commit()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.execute("VACUUM")
    for file in (*home.rglob("summary.json"), *home.rglob("result.json")):
        file.write_text(file.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name, Server() as server:
        folder = Path(name)
        os.chdir(folder)
        training = {"epochs": 2, "batch_size": 6, "learning_rate": 3e-2, "checkpoint_every": 2, "probe_rows": 8}
        write_config(Path(), tasks=TASKS, training=training, evaluation={"batch_size": 5, "oracle": False})
        home = folder / "home"
        Store.open(home)
        died = server.start(folder / "1", *RUN, AMLORA_HOME=str(home), AMLORA_CRASH="step_done:kill:21")
        assert died.wait() == -9, died.stderr
        shutil.copytree(home, folder / "whole")
        rewrite_texts(folder / "whole", str(home), str(folder / "whole"))
        done = server.start(folder / "2", *RUN, AMLORA_HOME=str(folder / "whole"))
        assert done.wait() == 0, done.stderr
        outcome = outcome_of(folder / "whole", done.stdout)
        expected = {name: getattr(outcome, name) for name in ("matrices", "adapters", "stages")}
        (folder / "expected.json").write_text(json.dumps(expected, indent=1), encoding="utf-8")
        rewrite_texts(home, str(folder), PLACE)
        for one in {socket.gethostname(), str(Path(sys.executable).parent), getpass.getuser()} - {"root"}:
            rewrite_texts(home, one, "host")
        for rubbish in ("mlflow.db.lock", "mlflow.db-wal", "mlflow.db-shm"):
            (home / rubbish).unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(target, "w:xz") as archive:
            for part in ("home", "run.yaml", "tasks", "model-llama", "expected.json"):
                archive.add(folder / part, part, filter=_anonymous)
    print(f"{target}: {target.stat().st_size:,} bytes")


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    entry.mtime = 0
    return entry


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
