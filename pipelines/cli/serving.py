"""``serve``: a bank over HTTP. The work is in ``pipelines.cluster.serve`` and ``amlora_dist.serving``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from amlora_dist.errors import UserError
from pipelines.cli.options import (
    Abstain,
    Bank,
    Base,
    Device,
    Dtype,
    Expected,
    Quantisation,
    Signature,
    TrackingUri,
    Verbose,
)

if TYPE_CHECKING:
    from pipelines.cluster.vllm_process import VllmSettings

DEFAULT_RANK = 32


def serve(
    bank: Bank,
    host: Annotated[str, typer.Option(help="To listen at; 0.0.0.0 for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="To listen at.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the bank; default: its own name.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Copies of the model; each batches what reaches it.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a replica; default: all, shared.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 512,
    max_prompt_characters: Annotated[int, typer.Option(min=1, help="Longest text with its question.")] = 32768,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest body of a request.")] = 1048576,
    max_texts: Annotated[int, typer.Option(min=1, max=4096, help="Most texts of one request.")] = 64,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Most texts at once in a replica; then 429.")] = 256,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 120.0,
    read_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that its head, and its body, may take.")] = 20.0,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="Name that clients may call the server by; again for more; * for any.", show_default=False),
    ] = None,
    batch_rows: Annotated[int, typer.Option(min=1, help="Most texts of one pass.")] = 32,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Most prompt tokens of one pass.")] = 4096,
    poll: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks at the alias.")] = 10.0,
    engine: Annotated[
        Literal["own", "vllm"], typer.Option(help="What computes: this project's own engine, or a vLLM behind it.")
    ] = "own",
    engine_url: Annotated[
        str | None, typer.Option(help="vllm: http://HOST:PORT of one that runs; default: a child.", show_default=False)
    ] = None,
    engine_python: Annotated[
        Path | None, typer.Option(help="vllm: the Python that has it, for a child; default: this one.", show_default=False)
    ] = None,
    engine_rank: Annotated[
        int | None,
        typer.Option(min=1, help="vllm: its --max-lora-rank; rows above it are compressed.", show_default="32"),
    ] = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantisation: Quantisation = None,
    abstain: Abstain = None,
    require_signature: Signature = None,
    expect_digest: Expected = None,
    tracking_uri: TrackingUri = None,
    verbose: Verbose = False,
) -> None:
    """Serve a bank over HTTP, as OpenAI's API, on Ray Serve; follows an alias; a page to try it at /.

    Clients need the key of the environment variable AMLORA_API_KEY, if it is set.
    """
    from amlora_dist.serving.settings import ServeSettings
    from pipelines.cluster.serve import Place, serve_bank

    settings = ServeSettings(
        max_body_bytes=max_body_bytes, max_prompt_characters=max_prompt_characters, max_new_tokens=max_new_tokens,
        max_texts=max_texts, max_concurrency=max_concurrency, request_timeout_s=request_timeout, batch_rows=batch_rows,
        prefill_tokens=prefill_tokens, poll_s=poll, read_timeout_s=read_timeout,
    )  # fmt: skip
    options: dict[str, Any] = {"base": base, "device": device, "dtype": dtype, "tracking_uri": tracking_uri}
    demanded = {"require_signature": require_signature and str(require_signature.expanduser().absolute()),
                "expect_digest": expect_digest, "abstain": abstain, "quantisation": quantisation}  # fmt: skip
    options |= {name: value for name, value in demanded.items() if value is not None}
    place = Place(host=host, port=port, replicas=replicas, threads=threads, names=tuple(allow_host or ()))
    vllm = _vllm(engine, engine_url, engine_python, engine_rank)
    serve_bank(bank, name, place, settings, options, typer.echo, vllm=vllm, verbose=verbose)


def _vllm(engine: str, url: str | None, python: Path | None, rank: int | None) -> VllmSettings | None:
    """What ``--engine vllm`` asks for; None for the own engine."""
    from pipelines.cluster.vllm_process import VllmSettings

    if engine == "own":
        for option, value in (("--engine-url", url), ("--engine-python", python), ("--engine-rank", rank)):
            if value is not None:
                raise UserError(f"{option} belongs to --engine vllm")
        return None
    if url is not None and python is not None:
        raise UserError("--engine-python: found with --engine-url, expected one of them: a vLLM that runs is not started")
    if url is not None:
        from amlora_dist.serving.vllm_client import checked_url

        url = checked_url(url)
    return VllmSettings(url=url, python=python, rank=DEFAULT_RANK if rank is None else rank)


COMMANDS: tuple[Callable[..., None], ...] = (serve,)
