"""A bank and its base model brought together: found, checked, and put into one another."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from amlora_dist.adapters.adapted_layers import AdaptedLayers
from amlora_dist.adapters.inject import Mixture, inject
from amlora_dist.adapters.router import PRIOR_KEY, router_from
from amlora_dist.adapters.router_override import OverridableRouter
from amlora_dist.adapters.selector_layer import Selectors
from amlora_dist.adapters.settings import AdapterSettings, LiteralSettings, RouterSettings
from amlora_dist.base_model import BaseModel, ModelSettings, folder_digest, resolve_base
from amlora_dist.config.former_values import completed
from amlora_dist.config.loading import home
from amlora_dist.errors import BankError, UserError
from amlora_dist.evaluation.settings import AnswerSettings
from amlora_dist.files import write_bytes
from amlora_dist.methods import LORA, form_of, method_class
from amlora_dist.methods.settings import MethodSettings
from amlora_dist.quantisation import QUANTISATIONS, Quantisation, check_package, package_fault, states
from amlora_dist.tasks.prompt_format import DEFAULT_TEXT_TOKENS, PromptFormat
from amlora_dist.training.settings import StageSettings, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from amlora_dist.registry.bank_folder import Bank
    from amlora_dist.registry.manifest import BaseEntry, Manifest
    from amlora_dist.registry.signing import Trust

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ATTENTION = ("sdpa", "eager", "flash_attention_2")


def sharing_copy(transformer: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same weights: modules of its own, to put another bank in, and not one tensor more."""
    shared = *transformer.parameters(), *transformer.buffers(), *states(transformer)
    weights: dict[int, Any] = {id(one): one for one in shared}
    return copy.deepcopy(transformer, weights)


def inject_bank(transformer: PreTrainedModel, bank: Bank, *, eos_id: int, abstain: float | None = None) -> Mixture:
    """Put a bank with its router into its base model; ``eos_id`` is its tokenizer's end token.

    Raises:
        UserError: as ``described_router``.
        BankError: a module, a setting or a shape that this base model does not have.
    """
    manifest = bank.manifest
    try:
        router_settings = RouterSettings(**completed(manifest.training_configuration).get("router", {}))
        own = described_router(bank, abstain)
        prior = own.pop(PRIOR_KEY, None)
        selectors = Selectors(settings=LiteralSettings(**own)) if manifest.router.by_layers else None
    except (ValidationError, TypeError) as error:
        raise BankError(f"manifest: the settings of its router do not fit this version: {error}") from error
    described = own if selectors is None else prior
    router = None if described is None else router_from(bank.router, described)
    layers = (selectors or bank_layers(manifest, router_settings)).marked(eos_id)
    return inject(
        transformer,
        layers.bank_targets(transformer, manifest.targets),
        bank.adapters,
        router=None if router is None else OverridableRouter(router),
        layers=layers,
        router_layer=router_settings.layer,
        depths=(router_settings.depths or ()) if layers.several_depths else (),
        skip_tokens=router_settings.skip_tokens,
    )


def bank_layers(manifest: Manifest, router: RouterSettings) -> AdaptedLayers:
    """The layers that a bank's adapters are in: plain ones, unless its method brings others, which say so of themselves.

    Raises:
        BankError: its configuration lacks what the method needs for them.
    """
    if form_of(manifest.method) == LORA:
        return AdaptedLayers()
    made_by = method_class(manifest.method)
    section = manifest.training_configuration.get("method_settings")
    known = section if isinstance(section, dict) else {}
    if missing := [key for key in made_by.uses if key not in known]:
        raise BankError(f"manifest.json: method_settings.{missing[0]}: missing, expected a value; fetch the bank again")
    try:
        own = MethodSettings(**{key: known[key] for key in made_by.uses})
        adapters = AdapterSettings(**completed(manifest.training_configuration).get("adapters", {}))
    except (ValidationError, TypeError) as error:
        raise BankError(f"manifest: the settings of method {manifest.method!r} do not fit this version: {error}") from error
    settings = StageSettings(
        method=manifest.method, seed=0, dtype="fp32", attention="eager", adapters=adapters, router=router,
        training=TrainingSettings(), method_settings=own,
    )  # fmt: skip
    return made_by(settings).layers


def bank_format(manifest: Manifest) -> PromptFormat:
    """How a bank's prompts become ids.

    Raises:
        BankError: a format of a later version.
    """
    found = completed(manifest.training_configuration)
    version, router = found["prompt_format"], found.get("router", {})
    if version not in (1, 2):
        raise BankError(
            f"manifest: prompt_format: found {version!r}, expected 1 or 2; a newer bank needs a newer amlora-dist"
        )
    return PromptFormat(version, int(router.get("max_text_tokens") or DEFAULT_TEXT_TOKENS))


def warn_of_former(prompt_format: PromptFormat, bank: str) -> None:
    """Say of a bank that was made before 0.2 what that means; ``bank`` is how it is called."""
    if not prompt_format.text_alone:
        log.warning(
            "%s was made before 0.2: its routing was measured behind its tasks' questions, and a plain text may be routed"
            " worse; `amlora rekey` gives it a router for plain text",
            bank,
        )


def answer_settings(manifest: Manifest) -> AnswerSettings:
    """How a bank weighs the labels of a task. Raises BankError where the settings do not fit this version."""
    try:
        return AnswerSettings(**completed(manifest.training_configuration)["answer"])
    except (ValidationError, TypeError) as error:
        raise BankError(f"manifest: the settings of its answers do not fit this version: {error}") from error


def check_description(bank: Bank, abstain: float | None) -> None:
    """See that a bank's router and layers can be made of what its manifest says, before a weight is read.

    Raises:
        UserError: as ``described_router``.
        BankError: as ``bank_layers``.
    """
    described = described_router(bank, abstain)
    if abstain:
        nearest = min((float(share) for share, _ in described["foreign_above"]), key=lambda share: abs(share - abstain))
        if nearest != abstain:
            log.warning("abstain: %g acts as %g, the nearest share for which this bank stores a threshold", abstain, nearest)
    try:
        router = RouterSettings(**completed(bank.manifest.training_configuration).get("router", {}))
    except (ValidationError, TypeError) as error:
        raise BankError(f"manifest: the settings of its router do not fit this version: {error}") from error
    bank_layers(bank.manifest, router)


def described_router(bank: Bank, abstain: float | None) -> dict[str, Any]:
    """Settings of a bank's router, with abstention as it is asked for here instead of as it was published.

    Args:
        bank: as read.
        abstain: share of its own rows that may be lost by giving texts of no task to the base model; between two for which
            thresholds are stored the nearer one is taken, and a line says so. 0: every text is taken for one of the
            bank's; None: as published.

    Raises:
        UserError: a share that is none, or beyond those that are stored; a bank without the background that tells such
            texts.
    """
    described = dict(bank.router_settings)
    if abstain is None:
        return described
    if not 0 <= abstain < 0.5:
        raise UserError(f"abstain: found {abstain:g}, expected a share of the bank's own rows from 0 (off) to 0.5")
    if abstain and not described.get("foreign_above"):
        raise UserError(
            f"abstain: found {abstain:g}, but this bank stores no background by which texts of no task are recognised; train"
            " it with router.background true and router.holdout above 0, or make its router again with `amlora rekey`"
        )
    if abstain:
        stored = sorted(float(share) for share, _ in described["foreign_above"])
        if not stored[0] <= abstain <= stored[-1]:
            shares = ", ".join(f"{share:g}" for share in stored)
            raise UserError(f"abstain: found {abstain:g}, this bank stores thresholds for {shares}; give one of them, or 0")
    if "gate" in described:
        chosen = {"abstention": True, "lost": abstain} if abstain else {"abstention": False}
        described["gate"] = described["gate"] | chosen
    return described


def check_quantisation(entry: BaseEntry, asked: str | None) -> None:
    """See that a bank's base model can be loaded here in the bits that are asked for (None: the bank's own).

    Raises:
        UserError: unknown bits, or a package is not installed; says what else could be asked for.
    """
    if asked is not None and asked not in QUANTISATIONS:
        raise UserError(f"quantisation: found {asked!r}, expected one of {', '.join(QUANTISATIONS)}")
    if asked is not None:
        check_package(asked, "quantisation")
        if asked != entry.quantisation:
            log.warning("the bank was trained on its base model in %s: in %s it answers otherwise than it was measured: two"
                        " banks lost 2.5 and 5.6 points by that (docs/evidence/quantised.md)",
                        _bits(entry.quantisation), _bits(asked))  # fmt: skip
    elif (fault := package_fault(entry.quantisation, "the bank's base model")) is not None:
        raise UserError(f"{fault}; or ask for quantisation none (--quantisation none), which answers otherwise")


def _bits(quantisation: str) -> str:
    return "full precision" if quantisation == "none" else quantisation


def resolve_bank_base(entry: BaseEntry, base: str | Path | None, quantisation: Quantisation | None = None) -> BaseModel:
    """The base model of a bank, as a local folder with the right digest.

    Args:
        entry: of its manifest.
        base: folder or Hub id, where it is not at the place that the bank names.
        quantisation: in which it is to be loaded; None: the one that the bank was trained on.

    Raises:
        UserError: it is not where the bank says (and ``base`` was not given), or its files are not those that the
            bank was trained on.
    """
    kind = entry.quantisation if quantisation is None else quantisation
    return replace(_bank_base(entry, base), quantisation=kind)


def _bank_base(entry: BaseEntry, base: str | Path | None) -> BaseModel:
    if base is None and (known := remembered_base(entry.digest)) is not None:
        return known
    source = entry.source if base is None else str(base)
    revision = entry.revision if base is None else None
    try:
        found = resolve_base(ModelSettings(source=source, revision=revision), home())
    except UserError as error:
        if base is not None:
            raise
        raise UserError(
            f"the bank's base model {entry.source!r} cannot be had from there ({error}); give the folder or Hub id "
            f"of the model whose files have sha256 {entry.digest[:12]}... as base= (on the command line --base)"
        ) from error
    if found.digest != entry.digest and folder_digest(found.path, home(), as_before=True) != entry.digest:
        raise UserError(
            f"base model {source!r}: digest: found {found.digest[:12]}..., the bank was trained on "
            f"{entry.digest[:12]}... ({entry.source!r}, revision {entry.revision or 'not pinned'}); with other "
            "weights, configuration or tokenizer the adapters would answer wrongly: give that very model as base= (--base)"
        )
    return found


def remember_base(base: BaseModel) -> None:
    """Note in ``AMLORA_HOME`` where a base model lies: banks name it without its folder, which is nobody else's business."""
    if Path(base.source).expanduser().is_dir():
        file = home() / "bases" / f"{base.digest}.txt"
        if not file.is_file() or file.read_text(encoding="utf-8") != str(base.path):
            write_bytes(file, str(base.path).encode())


def remembered_base(digest: str) -> BaseModel | None:
    """The base model of this digest, if it still lies where it was when it was last used here."""
    file = home() / "bases" / f"{digest}.txt"
    if not file.is_file():
        return None
    try:
        found = resolve_base(ModelSettings(source=file.read_text(encoding="utf-8")), home())
    except (UserError, OSError, UnicodeDecodeError):
        return None
    return found if found.digest == digest else None


def pulled(uri: str, tracking_uri: str | None, trust: Trust | None = None) -> tuple[str, Path]:
    """The version that a URI means, and its folder below ``AMLORA_HOME/banks``."""
    from amlora_dist.registry.pulling import pull_home
    from amlora_dist.registry.store import Store

    store = Store.open(home(), tracking_uri, reads=True)
    version = store.resolve(uri)
    return version.uri, pull_home(store, version, home() / "banks", trust=trust)


def chosen_device(asked: torch.device | str | None) -> torch.device:
    """The device asked for; the first GPU, or the CPU. Raises UserError for one that is not here."""
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"device: found {asked!r}, expected cpu, cuda, cuda:1 or the like") from None
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"device: found {str(device)!r}, this machine has {gpus} GPUs that PyTorch can use; expected cpu"
                        + (f", or cuda:0 to cuda:{gpus - 1}" if gpus else ""))  # fmt: skip
    if device.type == "meta":
        raise UserError("device: found 'meta', on which nothing is computed; expected cpu, cuda, cuda:1 or the like")
    return device


def chosen_dtype(asked: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; bf16 where the device has it, else fp32."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked is None or asked == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if bf16 else torch.float32
    if asked not in DTYPES:
        raise UserError(f"dtype: found {asked!r}, expected one of {', '.join(DTYPES)}, or a torch dtype")
    return DTYPES[asked]


def chosen_attention(manifest: Manifest, device: torch.device) -> str:
    """transformers' attention implementation: the one that the bank was trained with, where the device has it."""
    model = manifest.training_configuration.get("model")
    asked = model.get("attention", "sdpa") if isinstance(model, dict) else "sdpa"
    return asked if asked in ("sdpa", "eager") or (asked in ATTENTION and device.type == "cuda") else "sdpa"
