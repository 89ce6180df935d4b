"""The shape of a base model, from its configuration alone: modules on the meta device, no weights, nothing downloaded
but ``config.json``, and for the models in ``planning/models`` not even that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlora_dist.adapters.targets import (
    Target,
    check_router_layer,
    default_router_layer,
    find_targets,
    in_attention,
    layer_stacks,
    linear_sizes,
)
from amlora_dist.base_model import making_errors
from amlora_dist.errors import UserError
from amlora_dist.model_folder import count_faults, kernel_faults, short
from amlora_dist.quantisation import BYTES

if TYPE_CHECKING:
    from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
    from amlora_dist.base_model import ModelSettings

MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One repeated block. ``used`` counts the parameters that one token meets: of experts only those it is sent to."""

    parameters: int
    used: int
    trains: bool
    """Gradients pass through it: it has an adapter, or is above a layer that has one."""


@dataclass(frozen=True)
class Shape:
    """What planning has to know of a model. Counts are numbers of elements."""

    source: str
    tensors: tuple[int, ...]
    """Elements of every parameter tensor, tied ones once, in the model's order."""
    layers: tuple[LayerShape, ...]
    targets: tuple[Target, ...]
    below_router: int
    """How many layers are below the routing layer."""
    hidden: int
    attention_width: int
    """Query heads x head dimension."""
    key_value_width: int
    heads: int
    intermediate: int
    """Width of the feed-forward part times the experts that a token is sent to."""
    vocabulary: int
    linear: int = 0
    """Elements of the linear layers that ``model.quantisation`` is about."""
    quantisation: str = "none"

    def weight_bytes(self, size: int) -> int:
        """Of the base model, ``size`` bytes for each element that is not quantised."""
        if self.quantisation == "none":
            return size * self.parameters
        return size * (self.parameters - self.linear) + round(BYTES[self.quantisation] * self.linear)

    @cached_property
    def parameters(self) -> int:
        return sum(self.tensors)

    @cached_property
    def largest_layer(self) -> int:
        return max(layer.parameters for layer in self.layers)

    @cached_property
    def largest_tensor(self) -> int:
        return max(self.tensors)

    @cached_property
    def training_layers(self) -> int:
        return sum(layer.trains for layer in self.layers)

    @cached_property
    def training_attentions(self) -> int:
        """Of how many layers gradients pass through the attention too: not of the first one if only its MLP is adapted."""
        first = self.targets[0]
        lowest = [t for t in self.targets if (t.part, t.layer) == (first.part, first.layer)]
        return self.training_layers - (not any(in_attention(target.path) for target in lowest))

    @cached_property
    def adapter_width(self) -> int:
        """Elements of an adapter of rank 1: the sum of in and out features over the adapted layers."""
        return sum(target.in_features + target.out_features for target in self.targets)


def shape_of(model: ModelSettings, adapters: AdapterSettings, router: RouterSettings) -> Shape:
    """The shape of the configured base model.

    Raises:
        UserError: there is no configuration, or nothing to adapt in it; says what could be.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    values = configuration_of(model)
    kind = values.get("model_type")
    for fault in (*kernel_faults(model.source, values), *count_faults(model.source, values)):
        raise UserError(str(fault))
    try:
        config = AutoConfig.for_model(**values)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with torch.device("meta"):
            built = auto.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except making_errors() as error:
        raise UserError(
            f"model.source: {model.source!r}: transformers has no model type {kind!r} of such values ({short(error)})"
        ) from error
    k = default_router_layer(built) if router.layer is None else router.layer
    check_router_layer(built, k)
    return _measured(built, model, find_targets(built, adapters, k), k)


def shape_at_hand(model: ModelSettings, adapters: AdapterSettings, router: RouterSettings) -> Shape | None:
    """The same where nothing has to be fetched for it; None where this machine knows nothing of the model, or cannot
    tell its shape: whether it can be trained is for the run to say."""
    try:
        return None if _local_configuration(model) is None else shape_of(model, adapters, router)
    except UserError:
        return None


def _measured(model: Any, settings: ModelSettings, targets: list[Target], k: int) -> Shape:
    config = model.config
    top = _number(config, "num_experts_per_tok", default=1)
    experts = _number(config, "num_local_experts", "num_experts", default=1)
    layers: list[LayerShape] = []
    for stack in layer_stacks(model):
        first = min((target.layer for target in targets if target.part == stack.part), default=len(stack.layers))
        for index, layer in enumerate(stack.layers):
            named = [(name, parameter.numel()) for name, parameter in layer.named_parameters()]
            routed = sum(count for name, count in named if "experts" in name.split("."))
            whole = sum(count for _, count in named)
            layers.append(LayerShape(whole, whole - routed + routed * top // experts, index >= first))
    heads = _number(config, "num_attention_heads", "n_head", "num_heads")
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    head = _number(config, "head_dim", "d_kv", default=hidden // heads)
    wide = _number(config, "intermediate_size", "n_inner", "d_ff", "ffn_dim", default=4 * hidden)
    if experts > 1:
        wide = _number(config, "moe_intermediate_size", default=wide)
    return Shape(
        source=settings.source,
        tensors=tuple(parameter.numel() for parameter in model.parameters()),
        layers=tuple(layers),
        targets=tuple(targets),
        below_router=k,
        hidden=hidden,
        attention_width=heads * head,
        key_value_width=_number(config, "num_key_value_heads", default=heads) * head,
        heads=heads,
        intermediate=wide * top,
        vocabulary=_number(config, "vocab_size"),
        linear=_linear(model),
        quantisation=settings.quantisation,
    )


def _linear(model: Any) -> int:
    """Elements of the weights that bitsandbytes takes: of linear layers, without the output head and what stays in fp32."""
    head, whole = model.get_output_embeddings(), set(model._keep_in_fp32_modules or ())
    return sum(
        module.weight.numel()
        for path, module in model.named_modules()
        if linear_sizes(module) is not None and module is not head and whole.isdisjoint(path.split("."))
    )


def _number(config: Any, *names: str, default: int | None = None) -> int:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    if default is None:
        raise UserError(f"model.source: a {config.model_type!r} configuration without {names[0]} cannot be planned")
    return default


def configuration_of(model: ModelSettings) -> dict[str, Any]:
    """The content of ``config.json``: of a folder, of a model known here, or from the Hub (this one file).

    Raises:
        UserError: none of them has it.
    """
    if (values := _local_configuration(model)) is not None:
        return values
    if model.source.endswith(".json"):
        return _read(Path(model.source).expanduser())
    if model.source.startswith((".", "/", "~", "package:")):
        raise UserError(
            f"model.source: {model.source!r} has no configuration to plan with; give a folder with config.json, a Hub id,"
            f" or one of {', '.join(known_models())}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _read(Path(hf_hub_download(model.source, "config.json", revision=model.revision)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.source: cannot fetch config.json of {model.source!r} from the Hub: {error}; known without the Hub:"
            f" {', '.join(known_models())}"
        ) from error


def _local_configuration(model: ModelSettings) -> dict[str, Any] | None:
    folder = Path(model.source).expanduser()
    if folder.is_dir() or (folder.suffix == ".json" and folder.exists()):
        return _read(folder / "config.json" if folder.is_dir() else folder)
    for file in sorted(MODELS.glob("*.json")):
        values = _read(file)
        if model.source.lower() in {file.stem, str(values.get("_name_or_path", "")).lower()}:
            return values
    return None


def known_models() -> list[str]:
    """Names of the models whose shape comes with this package."""
    return sorted(str(_read(file)["_name_or_path"]) for file in MODELS.glob("*.json"))


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.source: cannot read {file}: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"model.source: {file} is not a transformers configuration: it has no model_type")
    return values
