"""How MLflow is reached: an embedded SQLite store below ``AMLORA_HOME``, any other database, or a tracking server.

MLflow is imported by ``connect``, never at import time. Several processes share one SQLite file: it is put in WAL
mode, its first use (MLflow creates the tables) is guarded by a file lock, and a call that meets "database is locked"
is repeated until its deadline. So is a call to a server that does not answer, with a longer deadline: training goes on
meanwhile, in processes that know nothing of MLflow.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import logging
import os
import random
import sqlite3
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from filelock import FileLock, Timeout

from amlora_dist import privacy
from amlora_dist.errors import AmloraError, UserError, is_full, plain_reason
from amlora_dist.registry import places
from amlora_dist.registry.reading import ReadingClient, SqliteReader, UnknownError
from amlora_dist.registry.reading_http import HttpReader

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_USE_DEADLINE_S = 300.0
CALL_DEADLINE_S = 120.0
OUTAGE_DEADLINE_S = 900.0
"""How long a call waits for a tracking server that has gone away in mid-run."""
KNOCK_DEADLINE_S = 20.0
KEY, VARIABLE = "mlflow.tracking_uri", "MLFLOW_TRACKING_URI"
"""Who names the store: the configuration (or --tracking-uri), or the environment."""
_TRANSIENT = {"TEMPORARILY_UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED"}
_LOCKED = ("database is locked", "database table is locked")
_AWAY = ("failed with exception", "failed with timeout exception", "error code 502", "error code 503", "error code 504")
"""In messages of MLflow's HTTP client, which has no error code for a server that does not answer."""


NO_ROOM = "make room, then start the same command again"


class StoreError(AmloraError):
    """MLflow answered with an error that repeating the call does not fix."""


class StoreAwayError(StoreError):
    """A tracking server did not answer for as long as a call waits; what was trained is kept on disk."""

    exit_code = UserError.exit_code


class StoreFullError(StoreError):
    """The disk of the store is full; what was written before is whole."""

    exit_code = UserError.exit_code


@dataclass(slots=True)
class Connection:
    """An MLflow client, where new experiments keep artifacts, and the rule for repeating a call."""

    client: MlflowClient | ReadingClient
    uri: str
    artifacts: str | None
    """Root of artifact folders for stores without a server; None: the tracking server decides."""

    secrets: tuple[str, ...] = ()
    """What no message may hold of ``uri``."""

    home: Path | None = None
    """Whose embedded store it is: all artifacts lie in it."""

    away: bool = False
    """A call gave up on the server; until one is answered again, others try once only, so that the run can end."""

    @property
    def shown(self) -> str:
        """``uri`` as it may be seen: without user, password and query."""
        return privacy.shown(self.uri, *self.secrets)

    def call(
        self, what: str, function: Callable[..., T], *args: Any, deadline_s: float = CALL_DEADLINE_S, **keys: Any
    ) -> T:
        """Call MLflow; repeat with growing pauses while the store says that it is busy, or does not answer.

        The store rolls back what it answers with "locked" to, so repeating is safe; over HTTP an answer can be lost
        after the work was done, which is why every write of this project finds what it made before it makes it again.

        Raises:
            StoreAwayError: no answer within ``OUTAGE_DEADLINE_S``.
            StoreFullError: the disk is full.
            StoreError: still busy at the deadline, or an error that stays.
            mlflow.exceptions.MlflowException: passed on when it says that something exists already or does not exist.
        """
        start, pause, warned = time.monotonic(), 0.05, False
        while True:
            try:
                result = function(*args, **keys)
            except store_errors() as error:
                if is_code(error, "RESOURCE_ALREADY_EXISTS") or is_code(error, "RESOURCE_DOES_NOT_EXIST"):
                    raise
                trouble = _trouble(error, remote=self.uri.startswith(("http:", "https:")))
                where, reason = f"MLflow at {self.shown}: {what}", privacy.shown(str(error), *self.secrets)
                if trouble == "full":
                    raise StoreFullError(
                        f"{where}: the disk is full ({_first_line(reason)}); what is published is whole: {NO_ROOM}"
                    ) from error
                if trouble == "other":
                    raise StoreError(f"{where}: {reason}") from error
                waited = time.monotonic() - start
                if trouble == "busy" and waited > deadline_s:
                    raise StoreError(
                        f"{where}: still busy after {waited:.0f} s ({reason[:200]}); "
                        "use a tracking server for many runs at once (mlflow.tracking_uri)"
                    ) from error
                if trouble == "away" and (self.away or waited > OUTAGE_DEADLINE_S):
                    self.away = True
                    raise StoreAwayError(
                        f"{where}: no answer for {waited:.0f} s ({_first_line(reason)}); what was trained is kept: when the"
                        " server is back, start the same command again"
                    ) from error
                if trouble == "away" and not warned:
                    warned = True
                    log.warning("%s: no answer; trying again for %.0f min", where, OUTAGE_DEADLINE_S / 60)
            else:
                if warned or self.away:
                    log.warning("MLflow at %s answers again", self.shown)
                self.away = False
                return result
            log.debug("MLflow busy: %s, again in %.2f s", what, pause)
            time.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, 2.0)

    def repository(self, artifact_uri: str) -> Any:
        """What reads and writes the artifacts of a run. MLflow's client keeps one for each run's id and the whole process,
        which would be another home's where one was copied."""
        if self.home is not None:
            artifact_uri = places.own_place(artifact_uri, self.home)

        def whole() -> Any:
            from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

            return get_artifact_repository(artifact_uri, tracking_uri=self.uri)

        return self.client.repository(artifact_uri, whole) if isinstance(self.client, ReadingClient) else whole()

    def pages(self, search: Callable[..., Any], text: str | None) -> list[Any]:
        """All results of a registry search, page by page."""
        found: list[Any] = []
        token: str | None = None
        while True:
            page = self.call("search the registry", search, filter_string=text, max_results=500, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


def mlflow_errors() -> tuple[type[Exception], ...]:
    """What MLflow raises; nothing as long as nobody has imported it."""
    exceptions = sys.modules.get("mlflow.exceptions")
    return () if exceptions is None else (exceptions.MlflowException,)


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow raises, and the disk or network below it."""
    return (OSError, *mlflow_errors())


def is_code(error: Exception, code: str) -> bool:
    """Whether an MLflow exception carries this error code."""
    return getattr(error, "error_code", None) == code


def _trouble(error: Exception, *, remote: bool) -> Literal["busy", "away", "full", "other"]:
    """What kind of trouble an error of MLflow's, or of the disk or network below it, means."""
    import requests

    reason = str(error)
    if is_full(error):
        return "full"
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return "other"
    if getattr(error, "error_code", None) in _TRANSIENT or any(words in reason for words in _LOCKED):
        return "busy"
    if isinstance(error, requests.HTTPError) and error.response is not None and error.response.status_code < 500:
        return "other"
    away = isinstance(error, requests.RequestException) or any(words in reason for words in _AWAY)
    return "away" if remote and away else "other"


def _first_line(reason: str) -> str:
    return reason.strip().partition("\n")[0][:200]


def store_uri(home: Path, tracking_uri: str | None) -> tuple[str, str]:
    """What says where MLflow is, and its URI; see ``connect``.

    Raises:
        UserError: a URI that cannot work.
    """
    where = KEY if tracking_uri else VARIABLE if os.environ.get(VARIABLE) else "AMLORA_HOME"
    tracking_uri = tracking_uri or os.environ.get(VARIABLE)
    uri = tracking_uri or f"sqlite:///{home / 'mlflow.db'}"
    if not tracking_uri:
        check_home(home)
    if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
        raise UserError(
            f"{where}: found {privacy.shown(uri)!r}, expected http(s)://HOST:PORT or sqlite:////ABSOLUTE/FILE.db (MLflow"
            " keeps no registry in plain files); or leave it out for the embedded store"
        )
    scheme, _, file = uri.partition("://")
    if scheme.startswith("sqlite") and (file.strip("/") == "" or ":memory:" in file or "mode=memory" in file):
        raise UserError(
            f"{where}: found {privacy.shown(uri)!r}, a store in memory that ends with this process, expected"
            " sqlite:////ABSOLUTE/FILE.db; or leave it out for the embedded store"
        )
    return where, uri


def check_home(home: Path) -> None:
    """Refuse a home that the embedded store cannot lie in. Raises UserError."""
    if any(sign in str(home) for sign in "?#%"):
        raise UserError(
            f"AMLORA_HOME: {home} holds one of ? # %, which a database URI cannot carry; use another folder"
        )


def connect(home: Path, tracking_uri: str | None, *, reads: bool = False) -> Connection:
    """Open MLflow.

    Args:
        home: ``AMLORA_HOME``; the embedded store is ``home/mlflow.db`` with artifacts below ``home/artifacts``.
        tracking_uri: a server (``http://...``) or a database URI; None: what MLflow's own variable
            ``MLFLOW_TRACKING_URI`` says, or else the embedded store.
        reads: for a command that only looks: MLflow itself is imported where it must be (``reading``).

    Raises:
        UserError: the URI's scheme is one that cannot work, or the server does not answer.
        StoreError: another process has prepared the SQLite file for longer than the deadline.
    """
    home = _resolved(home, "AMLORA_HOME")
    where, uri = store_uri(home, tracking_uri)
    _quiet()
    if uri.startswith("sqlite:///"):  # every path handed on is absolute: a worker has another working directory
        path, sign, options = uri.removeprefix("sqlite:///").partition("?")
        uri = f"sqlite:///{_resolved(Path(path), where)}{sign}{options}"
    if uri.startswith(("http:", "https:")):
        _knock(uri, where)
    if uri.startswith("sqlite:///"):
        home = places.home_of(_sqlite_file(uri), home)
        client = _open_sqlite(uri, where, home, reads=reads)
    else:
        client = _client(uri, where, reads=reads)
    secrets = tuple(privacy.secrets_of(uri))
    if uri.startswith(("http:", "https:", "databricks")):
        return Connection(client, uri, None, secrets)
    embedded = uri.startswith("sqlite:///") and _sqlite_file(uri) == home / places.DATABASE
    return Connection(client, uri, str(home / places.ARTIFACTS), secrets, home if embedded else None)


_PACKAGES = {
    "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient", "pymysql": "PyMySQL", "mysql": "mysql-connector-python",
}  # fmt: skip
"""What has to be installed for a driver's module, where it is called otherwise."""


def _client(uri: str, where: str, *, reads: bool = False) -> MlflowClient | ReadingClient:
    """MLflow's client of a store that can be used, or what reads it in place of that."""
    if reads:
        with contextlib.suppress(UnknownError, sqlite3.Error):
            if uri.startswith(("http:", "https:")):
                return ReadingClient(HttpReader(uri), lambda: _client(uri, where))
            if uri.startswith("sqlite:///"):
                return ReadingClient(SqliteReader(_sqlite_file(uri)), lambda: _client(uri, where))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    seen = privacy.shown(uri)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)  # opens both; a database migrates here
        client.search_registered_models(max_results=1)
    except ModuleNotFoundError as error:
        module = (error.name or str(error)).partition(".")[0]
        raise UserError(
            f"{where}: found {seen}, whose driver {module!r} is not installed; run: pip install"
            f" {_PACKAGES.get(module, module)}"
        ) from None
    except (ImportError, MlflowException, SQLAlchemyError, ValueError) as error:  # versions that do not fit together, too
        fix = NO_ROOM if is_full(error) else "fix the store or give another URI"
        reason = _first_line(privacy.shown(str(error), *privacy.secrets_of(uri)))
        raise UserError(f"{where}: found {seen}, expected a store that can be used ({reason}); {fix}") from None
    return client


def _knock(uri: str, where: str) -> None:
    """Fail at once when nobody listens: MLflow's own client would try for two minutes."""
    scheme, _, rest = uri.partition("://")
    user, at, host = rest.rpartition("@")
    if "?" in host or "#" in host:
        raise UserError(
            f"{where}: found {privacy.shown(uri)} with a query, which MLflow's client cannot send; give user and password"
            " as http://USER:PASSWORD@HOST, or in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    request = urllib.request.Request(f"{scheme}://{host.rstrip('/')}/health")
    if at:  # as MLflow's client sends it; urllib would take it for a part of the host's name
        code = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {code}")
    try:
        with urllib.request.urlopen(request, timeout=KNOCK_DEADLINE_S):
            pass
    except urllib.error.HTTPError:
        return  # an answer, if only of a proxy; MLflow's client says more
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(getattr(error, "reason", error), ssl.SSLError):
            return  # somebody listens; MLflow's client knows the certificates that its own variables name
        reason = privacy.shown(plain_reason(error), *privacy.secrets_of(uri))
        raise UserError(
            f"{where}: found {privacy.shown(uri)}, expected a server that answers within {KNOCK_DEADLINE_S:.0f} s"
            f" ({reason}); start it, or fix the address"
        ) from None


def _resolved(path: Path, where: str) -> Path:
    try:
        path.exists()  # raises for a name that is too long
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise UserError(
            f"{where}: found {path}, expected a folder or file that can be reached ({plain_reason(error)}); name another"
        ) from error


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


def _open_sqlite(uri: str, where: str, home: Path, *, reads: bool) -> MlflowClient | ReadingClient:
    file = _sqlite_file(uri)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{where}: found {file}, expected a file in a folder that can be written ({plain_reason(error)}); name another"
        ) from error
    try:
        with FileLock(f"{file}.lock", timeout=FIRST_USE_DEADLINE_S):
            with contextlib.closing(sqlite3.connect(file, timeout=60)) as connection:
                mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            if mode != "wal":
                log.warning(
                    "%s: SQLite journal mode is %s, not WAL (a network disk?); writers will wait longer", file, mode
                )
            places.settle(file, home)
            return _client(uri, where, reads=reads)
    except Timeout as error:
        raise StoreError(
            f"waited {FIRST_USE_DEADLINE_S:.0f} s for another process to prepare {file} ({file}.lock)"
        ) from error
    except (sqlite3.Error, OSError) as error:
        fix = NO_ROOM if is_full(error) else "name another file, or leave it out for the embedded store"
        raise UserError(
            f"{where}: found {file}, expected a SQLite file that can be written ({plain_reason(error)}); {fix}"
        ) from error


def _quiet() -> None:
    """Keep MLflow's own chatter (table creation, progress bars, usage statistics) out of a user's terminal."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # seven tries take MLflow's client two minutes; ``Connection.call`` is who repeats, and says so
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    # "database is locked" is logged there with a traceback before it is raised; connection.call repeats and reports
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
