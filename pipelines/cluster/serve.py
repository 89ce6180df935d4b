"""``amlora serve``: the app of ``amlora_dist.serving`` as a Ray Serve deployment.

A replica holds the model, batches what reaches it and follows the alias by itself; Ray Serve starts replicas, spreads
requests over them, restarts one whose health check fails, and lets running requests finish when it is asked to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from amlora_dist.config.loading import home
from amlora_dist.errors import AmloraError, UserError
from amlora_dist.registry.connection import VARIABLE
from amlora_dist.serving.front import ANY_HOST, is_loopback
from pipelines.cluster.vllm_process import Vllm, VllmSettings, vllm_for
from pipelines.runs.interrupts import EXIT_CODES

if TYPE_CHECKING:
    from amlora_dist.registry.bank_folder import Bank
    from amlora_dist.serving.engine_interface import EngineMaker
    from amlora_dist.serving.middleware import Gatekeeper
    from amlora_dist.serving.settings import ServeSettings

log = logging.getLogger(__name__)

KEY_VARIABLE = "AMLORA_API_KEY"
READY_DEADLINE_S = 60.0
STOP_GRACE_S = 15.0
WATCH_EVERY_S = 5.0
KEEP_ALIVE_S = 30
"""A connection that does nothing is closed after this."""


class StoppedServerError(AmloraError):
    """Asked to stop by a signal, and stopped; not an error of anybody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where and on what a server runs."""

    host: str
    port: int
    replicas: int
    threads: int | None
    """CPU threads of a replica; None: this machine's, shared among the replicas."""
    names: tuple[str, ...] = ()
    """That clients may call it by, besides ``host``; ``*`` for any."""

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names for the door (``Front``): any, unless it listens at loopback only or names are given."""
        if self.names:
            return (self.host.lower(), *self.names)
        return None if is_loopback(self.host) else (ANY_HOST,)

    @property
    def url(self) -> str:
        """Where this machine reaches it."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "") else "::1" if self.host == "::" else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def serve_bank(
    bank: str,
    name: str | None,
    place: Place,
    settings: ServeSettings,
    options: dict[str, Any],
    say: Callable[[str], None],
    *,
    vllm: VllmSettings | None = None,
    verbose: bool,
) -> None:
    """Serve a bank until a signal comes.

    Args:
        bank: ``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a folder.
        name: what clients call it; default: the registered model's or the folder's name.
        place: where.
        settings: limits of each replica.
        options: ``base``, ``device``, ``dtype``, ``tracking_uri`` of ``AMLoRAModel.from_bank``, and what it demands.
        say: is called with what a person who started it wants to know.
        vllm: what computes; None: this project's own engine.
        verbose: show Ray's own log lines.

    Raises:
        UserError: no such bank or base model, a port in use, Ray Serve not installed, no vLLM or one that does not fit.
        StoppedServerError: after a signal, with its exit code.
    """
    _check_installed()
    key = taken_key()
    from amlora_dist.serving.bank import check_name, default_name

    name = name or default_name(bank)
    check_name(name)
    if not bank.startswith("models:"):
        bank = str(Path(bank).expanduser().resolve())
    # Replicas on other machines do not share this process's environment.
    options = options | {"tracking_uri": options["tracking_uri"] or os.environ.get(VARIABLE)}
    version, read = _checked(bank, options)
    _check_port(place)
    if key is None and not is_loopback(place.host):
        log.warning("anybody who reaches %s:%s can use this server; set %s to ask for a key", place.host, place.port,
                    KEY_VARIABLE)  # fmt: skip
    with contextlib.ExitStack() as stack:
        behind = stack.enter_context(vllm_for(vllm, read, name, version, options, say)) if vllm is not None else None
        received = _run(bank, name, version, place, settings, options, key, behind, say, verbose=verbose)
    stopped = StoppedServerError("stopped")
    stopped.exit_code = EXIT_CODES[signal.Signals(received.numbers[0])]
    raise stopped


def _run(
    bank: str,
    name: str,
    version: str,
    place: Place,
    settings: ServeSettings,
    options: dict[str, Any],
    key: str | None,
    behind: Vllm | None,
    say: Callable[[str], None],
    *,
    verbose: bool,
) -> Received:
    """Run the app on Ray Serve until a signal comes, and stop it; returns what came."""
    application = f"amlora-{name}"
    with connected(place, settings, verbose=verbose) as own_serve, _signals() as received:
        from ray import serve

        build = builder(bank, name, settings, options, key, place.hosts,
                        None if behind is None else (behind.url, behind.rank))  # fmt: skip
        start(application, deployment(build, place, settings, device=options["device"]), place, verbose=verbose)
        say(f"serving {version} at {place.url}" + (f", vLLM at {behind.url} behind it" if behind else ""))
        try:
            _watch(place, version, received, say, behind)
        finally:
            say("stopping; what runs is finished first")
            stop(application, settings.request_timeout_s)
            if own_serve:
                serve.shutdown()
    return received


def deployment(
    build: Callable[[], Gatekeeper], place: Place, settings: ServeSettings, *, name: str = "bank", device: str | None = None
) -> Any:
    """An application for ``serve.run``.

    Args:
        build: called in each replica, gives the app with its model loaded.
        place: how many replicas, with how many threads.
        settings: of the service in the app.
        name: of the deployment.
        device: that the model wants; with none or a GPU's, a replica asks Ray for a GPU where there are some.
    """
    from ray import serve

    def built() -> Any:  # Ray Serve wants a plain function
        return build()

    class BankServer:
        """Its app comes from ``build``."""

        def check_health(self) -> None:
            """Asked by Ray Serve, which replaces a replica whose engine died or hangs."""
            if (status := self.app.service.status) == "failed":  # type: ignore[attr-defined]
                raise RuntimeError(f"the engine has {status}")

    threads = place.threads or max(1, (os.cpu_count() or 1) // place.replicas)
    environment = {"AMLORA_HOME": str(home()), "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return serve.deployment(
        serve.ingress(built)(BankServer),
        name=name,
        num_replicas=place.replicas,
        # Above our own limit, so that it is our limit that answers, with a message.
        max_ongoing_requests=settings.max_concurrency + 64,
        graceful_shutdown_timeout_s=settings.request_timeout_s + 5,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=5,
        health_check_timeout_s=30,
        ray_actor_options={
            "num_cpus": threads, "num_gpus": _gpus(device), "runtime_env": {"env_vars": environment}
        },
    ).bind()  # fmt: skip


def builder(
    bank: str,
    name: str,
    settings: ServeSettings,
    options: dict[str, Any],
    key: str | None,
    hosts: tuple[str, ...] | None,
    vllm: tuple[str, int] | None,
) -> Callable[[], Gatekeeper]:
    """Makes the app of a replica. The key goes there as its digest; of a vLLM its address and its largest rank."""
    from amlora_dist.serving.middleware import key_digest

    limits, digest = asdict(settings), None if key is None else key_digest(key)

    def build() -> Gatekeeper:
        from amlora_dist.serving.alias_watcher import Follower, is_moving
        from amlora_dist.serving.app import build_app
        from amlora_dist.serving.bank import ServedBank
        from amlora_dist.serving.service import Service
        from amlora_dist.serving.settings import ServeSettings

        maker: EngineMaker | None = None
        if vllm is not None:
            from amlora_dist.serving.vllm_engine import VllmEngine

            maker = functools.partial(VllmEngine, url=vllm[0], home=home(), rank=vllm[1])
        service = Service(ServedBank.load(bank, name, **options), ServeSettings(**limits), maker)
        loading = {key: value for key, value in options.items() if key != "tracking_uri"}
        follower = Follower(service, bank, options["tracking_uri"], **loading) if is_moving(bank) else None
        return build_app(service, key=digest, follower=follower, hosts=hosts)

    return build


def taken_key() -> str | None:
    """The API key, taken out of this process's environment: what Ray starts below must not inherit it.

    The block that the system shows of a running process (``/proc/PID/environ``) keeps what the process began with;
    there the key's characters are overwritten.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is not None:
        libc = ctypes.CDLL(None)
        libc.getenv.restype, libc.getenv.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
        place = libc.getenv(KEY_VARIABLE.encode())
        if place:
            ctypes.memset(place, ord("*"), len(ctypes.string_at(place)))
        del os.environ[KEY_VARIABLE]
    return key or None


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        from ray import serve  # noqa: F401
    except ImportError as error:
        raise UserError(f"amlora serve needs {error.name}: pip install 'amlora-dist[serve]'") from error


def _checked(bank: str, options: dict[str, Any]) -> tuple[str, Bank]:
    """The version to serve and its bank, after all that can be looked at before Ray starts."""
    from amlora_dist.inference.loading import check_description, check_quantisation, pulled, resolve_bank_base
    from amlora_dist.registry.signing import Trust

    trust = Trust.of(options.get("require_signature"), options.get("expect_digest"))
    if bank.startswith("models:"):
        version, folder = pulled(bank, options["tracking_uri"], trust)
    else:
        version, folder = bank, Path(bank)
    read = trust.read(folder, statistics=False)
    check_description(read, options.get("abstain"))
    check_quantisation(read.manifest.base, options.get("quantisation"))
    resolve_bank_base(read.manifest.base, options["base"])
    return version, read


def _check_port(place: Place) -> None:
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((place.host, place.port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"--host, --port: cannot listen at {place.host}:{place.port} ({error}); give another port, 8001 say"
            ) from error


@contextlib.contextmanager
def connected(place: Place, settings: ServeSettings | None = None, *, verbose: bool) -> Iterator[bool]:
    """Ray, connected or started; gives whether Ray Serve is ours to shut down. ``settings`` are the proxy's."""
    import ray
    from ray import serve

    from amlora_dist.serving.settings import ServeSettings
    from pipelines.cluster.relay import environment

    options: dict[str, Any] = {"log_to_driver": verbose, "logging_level": logging.INFO if verbose else logging.ERROR}
    if not os.environ.get("RAY_ADDRESS"):
        wanted = place.replicas * (place.threads or 1)
        # "local": without it Ray would join whatever cluster somebody has started on this machine.
        options |= {"address": "local", "num_cpus": max(os.cpu_count() or 1, wanted), "include_dashboard": False}
        # A busy machine takes longer than Ray Serve's 5 s to start the process that listens; it would be killed.
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
        os.environ.update(environment(settings or ServeSettings(), place.hosts))
    ray.init(**options)
    try:
        yield not serve.status().proxies
    finally:
        ray.shutdown()


class Received:
    """Signals that came."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.some = threading.Event()

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """The handler; the second signal interrupts at once."""
        self.numbers.append(number)
        self.some.set()
        if len(self.numbers) > 1:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _signals() -> Iterator[Received]:
    """Inside, SIGINT and SIGTERM are received instead of ending the program. To be entered when Ray, which sets a
    handler of its own, is there."""
    received = Received()
    before = {number: signal.signal(number, received) for number in EXIT_CODES}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(application: str, deployment: Any, place: Place, *, prefix: str = "/", verbose: bool) -> None:
    """Run the application and wait until it answers.

    Raises:
        UserError: a replica cannot start, or another Ray Serve of this cluster listens elsewhere.
    """
    import ray
    from ray import serve

    if not verbose:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process: set to INFO when it is imported
    quiet = {"log_level": "INFO" if verbose else "WARNING", "enable_access_log": verbose}
    try:
        http = {"host": place.host, "port": place.port, "keep_alive_timeout_s": KEEP_ALIVE_S}
        serve.start(http_options=http, logging_config=quiet)
        serve.run(deployment, name=application, route_prefix=prefix, logging_config=quiet)
    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
        found = serve.status().applications.get(application)
        reasons = [str(error), *(one.message for one in (found.deployments.values() if found else ()))]
        raise UserError("the server cannot start:\n" + "\n".join(reasons)) from error
    deadline = time.monotonic() + READY_DEADLINE_S
    while _health(f"{place.url}{prefix.rstrip('/')}") is None:
        if time.monotonic() > deadline:
            raise UserError(
                f"{place.url} did not answer within {READY_DEADLINE_S:.0f} s; if Ray Serve ran on this cluster before, "
                "its own host and port are in force: stop it (serve shutdown) or give those"
            )
        time.sleep(0.2)


def _health(url: str) -> str | None:
    """The version that is served; None where nobody answers."""
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
            return str(json.load(answer)["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _watch(
    place: Place, version: str, received: Received, say: Callable[[str], None], behind: Vllm | None = None
) -> None:
    """Until a signal comes, tell when another version is served or nobody answers.

    Raises:
        AmloraError: the vLLM that was started for it has ended.
    """
    before: str | None = version
    while not received.some.wait(WATCH_EVERY_S):
        if behind is not None:
            behind.check()
        now = _health(place.url)
        if now != before:
            say(f"serving {now} now" if now else "the server does not answer; Ray Serve replaces replicas that fail")
        before = now


def stop(application: str, request_timeout_s: float) -> None:
    """Take the application away: no new requests, and time for those that run."""
    from ray import serve

    serve.delete(application, _blocking=False)
    deadline = time.monotonic() + request_timeout_s + STOP_GRACE_S
    while application in serve.status().applications:
        if time.monotonic() > deadline:
            log.warning("requests were still running after %.0f s; they are cut off", request_timeout_s)
            return
        time.sleep(0.1)


def _gpus(device: str | None) -> float:
    """GPUs that a replica asks Ray for."""
    import ray

    if device is not None and not str(device).startswith("cuda"):
        return 0
    return 1 if ray.cluster_resources().get("GPU", 0) > 0 else 0
