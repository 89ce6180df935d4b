"""A served bank for Ray Serve's own configurations: ``import_path: pipelines.cluster.serve_app:application``.

``amlora serve`` makes the same application and runs it until a signal comes; here a RayService of KubeRay, or ``serve run``,
does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from amlora_dist.quantisation import Quantisation
from amlora_dist.registry.connection import VARIABLE
from amlora_dist.serving.front import ANY_HOST
from amlora_dist.serving.settings import ServeSettings
from pipelines.cluster.serve import Place, builder, deployment, taken_key


class ServedBankArgs(BaseModel):
    """``args`` of an application: what ``amlora serve`` has options for."""

    model_config = ConfigDict(extra="forbid")

    bank: str
    """``models:/NAME@ALIAS``, ``models:/NAME/VERSION`` or a folder that every node sees."""
    name: str | None = None
    """What clients call it; default: the registered model's or the folder's name."""
    replicas: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a replica."""
    base: str | None = None
    device: str | None = None
    dtype: str = "auto"
    quantisation: Quantisation | None = None
    """Of the base model; None: the bank's own."""
    abstain: float | None = None
    """Share of own rows that may be lost by giving texts of no task to the base model; None: as the bank was published."""
    require_signature: str | None = None
    """PEM of the public key that must have signed the bank, where every node sees it."""
    expect_digest: str | None = None
    """The manifest's, as ``amlora verify`` prints it."""
    engine_url: str | None = None
    """Of a vLLM that every replica reaches; None: this project's own engine."""
    engine_rank: int = Field(default=32, ge=1)
    """Its ``--max-lora-rank``."""
    limits: ServeSettings = ServeSettings()


def application(args: ServedBankArgs) -> Any:
    """An application for Ray Serve. The API key is that of ``AMLORA_API_KEY`` where this is called: on the head.

    Raises:
        UserError: a name with a colon.
    """
    from amlora_dist.serving.bank import check_name, default_name

    name = args.name or default_name(args.bank)
    check_name(name)
    bank = args.bank if args.bank.startswith("models:") else str(Path(args.bank).expanduser().resolve())
    options = {
        "base": args.base, "device": args.device, "dtype": args.dtype, "quantisation": args.quantisation,
        "abstain": args.abstain, "require_signature": args.require_signature, "expect_digest": args.expect_digest,
        "tracking_uri": os.environ.get(VARIABLE),
    }  # fmt: skip
    vllm = None if args.engine_url is None else (args.engine_url, args.engine_rank)
    build = builder(bank, name, args.limits, options, taken_key(), (ANY_HOST,), vllm)
    place = Place(host="0.0.0.0", port=8000, replicas=args.replicas, threads=args.threads)
    return deployment(build, place, args.limits, device=args.device)
