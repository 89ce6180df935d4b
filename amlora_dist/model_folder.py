"""What can be known to be wrong with a model's folder from its small files and the headers of its large ones.

Nothing here imports torch, reads a weight, or runs what a folder brings along.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from amlora_dist.errors import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

KEY = "model.source"
INDEX = "model.safetensors.index.json"
AGAIN = "fetch the model again"

_QUANTISED_KEYS = ("quantization_config", "compression_config")
_QUANTISED_FILES = ("quantize_config.json", "quant_config.json")
"""Where GPTQ and AWQ wrote theirs before transformers had a key for it."""
_STATES = ("mamba_", "ssm_", "state_size", "linear_conv_", "conv_L_cache", "lru_width")
_RECURRENT = ("rwkv", "xlstm", "mamba", "mamba2", "falcon_mamba", "jamba", "zamba", "zamba2", "bamba", "nemotron_h")
"""Keys and kinds of models with state-space or other recurrent layers."""
_DEPTH = 3
"""How deep a configuration holds others: of text, vision, a decoder."""
_COUNTED = re.compile(r"(layers?|blocks|experts|codebooks|labels?|label2id|layer_types)$")
"""Keys that count what transformers makes a module of, or an entry of a dictionary."""
MOST_PARTS = 10_000


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file."""

    shape: tuple[int, ...]
    dtype: str
    """In safetensors' words: ``F32``, ``BF16``, ``I8``."""


def folder_faults(folder: Path, config: Mapping[str, Any]) -> list[Fault]:
    """Everything in a folder that would fail, or do what nobody asked for, once a library reads it.

    Args:
        folder: of the model.
        config: what its ``config.json`` holds.
    """
    found = [*small_file_faults(folder, config), *(_shard_faults(folder) or _torn_faults(folder))]
    for name in ("generation_config.json", "tokenizer_config.json"):
        if not isinstance(_value(folder / name), dict | None):
            found.append(_fault(f"{folder / name}: no JSON object", "names with their values", AGAIN))
    if (folder / "adapter_config.json").is_file():
        # transformers would put it into the model unasked, and the adapters of a bank would come on top of it.
        file = folder / "adapter_config.json"
        found.append(_fault(f"{file}: an adapter inside of the model", "a plain base model", "take its files away"))
    return found


def small_file_faults(folder: Path, config: Mapping[str, Any]) -> list[Fault]:
    """The part of ``folder_faults`` that is known before the weights are fetched."""
    return [
        *_code_faults(folder, config),
        *_quantised_faults(folder, config),
        *count_faults(folder / "config.json", config),
        *_generation_faults(folder / "generation_config.json"),
    ]


def tokenizer_faults(folder: Path, config: Mapping[str, Any]) -> list[Fault]:
    """What ``tokenizer.json`` alone tells: whether it can be read, and whether the model has a row for each token."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return []
    if _value(file) is None:
        return [_fault(f"{file.stat().st_size} bytes in {file} that are no JSON", "a tokenizer that can be read", AGAIN)]
    from tokenizers import Tokenizer

    try:
        tokens = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing narrower)
        found = f"a tokenizer in {file} that cannot be loaded ({short(error)})"
        return [_fault(found, "one that transformers reads", AGAIN)]
    size = config.get("vocab_size", _section(config, "text_config").get("vocab_size"))
    return size_faults(file, tokens, size) if isinstance(size, int) else []


def size_faults(file: Path, tokens: Mapping[str, int], rows: int) -> list[Fault]:
    """What is wrong with a tokenizer for a model with so many rows in its embedding.

    Args:
        file: of the tokenizer, for the message.
        tokens: ids by token.
        rows: of the model's embedding.
    """
    beyond = sorted((place, token) for token, place in tokens.items() if place >= rows)
    if not beyond:
        return []
    place, token = beyond[0]
    found = f"{len(tokens)} tokens in {file}, {token!r} is number {place}"
    expected = f"numbers below {rows}, the rows of the model's embedding"
    return [_fault(found, expected, "give the tokenizer that the model was trained with, or resize_token_embeddings")]


def short(error: BaseException) -> str:
    """The first line of what a library says, or the second one where the first only announces another's error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    inner = re.match(r"\w+Error: (.+)", lines[1]) if len(lines) > 1 else None
    text = (lines[0] if inner is None else inner[1]).rstrip(".:")
    return text if len(text) <= 160 else f"{text[:157]}..."


def _code_faults(folder: Path, config: Mapping[str, Any]) -> list[Fault]:
    """Code that comes with a model is never run; what transformers makes itself needs none."""
    expected = "a model that transformers makes itself"
    hint = "code that comes with a model is never run; give another model"
    found = []
    for place, section in _sections(config):
        if section.get("auto_map") is not None and not (place == "" and _made_by_transformers(config)):
            what = f"{folder / 'config.json'}: {place}auto_map: code of its own for {_kind(config)}"
            found.append(_fault(what, expected, hint))
            break
    found += kernel_faults(folder / "config.json", config)
    file = folder / "tokenizer_config.json"
    settings = _read(file)
    if settings.get("auto_map") is not None and not _transformers_has(settings.get("tokenizer_class"), "Fast"):
        what = f"{file}: auto_map: code of its own for tokenizer_class {settings.get('tokenizer_class')!r}"
        found.append(_fault(what, "a tokenizer that transformers has itself", hint))
    return found


def kernel_faults(file: Path | str, config: Mapping[str, Any]) -> list[Fault]:
    """Attention of a Hub repository, whose code transformers fetches and runs where ``kernels`` is installed."""
    for place, section in _sections(config):
        for key, value in section.items():
            if "_implementation" in key and any("/" in str(one) for one in _values(value)):
                hint = f"code from elsewhere is never run; take {key} away: model.attention says which attention is used"
                return [_fault(f"{file}: {place}{key}: {str(value)[:60]}", "eager, sdpa or flash_attention_2", hint)]
    return []


def count_faults(file: Path | str, config: Mapping[str, Any]) -> list[Fault]:
    """Numbers of layers, experts or labels for which a model without weights already takes hours and all memory."""
    for place, section in _sections(config):
        for key, value in section.items():
            count = len(value) if isinstance(value, (dict, list)) else value
            if _COUNTED.search(key) and isinstance(count, int) and count > MOST_PARTS:
                return [_fault(f"{file}: {place}{key}: {count}", f"at most {MOST_PARTS}", AGAIN)]
    return []


def _generation_faults(file: Path) -> list[Fault]:
    """Numbers of tokens that are none: transformers compares them as they are, once the weights are loaded."""
    for key, value in _read(file).items():
        if not key.endswith("_token_id") or value is None:
            continue
        many = ("eos_token_id", "forced_eos_token_id", "decoder_start_token_id")
        ids = value if isinstance(value, list) and key in many else [value]
        if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
            return [_fault(f"{file}: {key}: {str(value)[:60]!a}", "the number of a token", AGAIN)]
    return []


def _values(value: object) -> list[object]:
    return list(value.values()) if isinstance(value, dict) else [value]


def _made_by_transformers(config: Mapping[str, Any]) -> bool:
    """Whether transformers has this kind and the very classes that the configuration names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    names = config.get("architectures")
    named = isinstance(names, list) and names and all(_transformers_has(name) for name in names)
    return bool(named) and config.get("model_type") in CONFIG_MAPPING_NAMES


def _transformers_has(name: object, suffix: str = "") -> bool:
    import transformers

    return isinstance(name, str) and (hasattr(transformers, name) or hasattr(transformers, f"{name}{suffix}"))


def _kind(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return ", ".join(map(str, names)) if isinstance(names, list) and names else f"model_type {config.get('model_type')!r}"


def _quantised_faults(folder: Path, config: Mapping[str, Any]) -> list[Fault]:
    file = folder / "config.json"
    found = [
        f"{file}: {place}{key}: {_method(section[key])}"
        for place, section in _sections(config)
        for key in _QUANTISED_KEYS
        if section.get(key) is not None
    ]
    found += [f"{folder / name}: quantised weights" for name in _QUANTISED_FILES if (folder / name).is_file()]
    hint = "give the folder of the model before it was quantised (model.quantisation quantises it as it is loaded)"
    return [_fault(what, "weights in fp32, bf16 or fp16", hint) for what in found[:1]]


def _method(section: object) -> str:
    method = section.get("quant_method") if isinstance(section, dict) else None
    return f"weights quantised with {method}" if isinstance(method, str) else "quantised weights"


def unpackable(config: Mapping[str, Any]) -> str | None:
    """What keeps rows of such a model from sharing a sequence (``training.packing``); None where nothing is known to.

    A mask over whole rows takes the place of a layer's own window, states run on from row to row, and positions that are
    made of a mask do not start again from 0.
    """
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder"
    for section in (config, _section(config, "text_config")):
        layers = section.get("layer_types")
        odd = sorted({str(one) for one in layers} - {"full_attention"}) if isinstance(layers, list) else []
        window = section.get("sliding_window")
        room = section.get("max_position_embeddings")
        wide = isinstance(window, int) and isinstance(room, int) and window >= room  # no row reaches beyond it
        if not isinstance(layers, list) and window and not wide and section.get("use_sliding_window", True) is not False:
            odd = [f"sliding_window {window}"]
        if odd:
            return f"a {kind} model with {', '.join(odd)}"
    if any(key.startswith(_STATES) for key in config) or kind in _RECURRENT:
        return f"a {kind} model, whose states run on from row to row"
    if kind == "bloom" or config.get("alibi") is True:
        return f"a {kind} model, whose positions follow from its mask"
    return None


def _shard_faults(folder: Path) -> list[Fault]:
    """Shards that an index names and that are not there, or do not hold what it says."""
    file = folder / INDEX
    if not file.is_file():
        return []
    named = _read(file).get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(name, str) for name in named.values()):
        return [_fault(f"{file}: no weight_map of tensors to files", "an index of the model's shards", AGAIN)]
    tensors: dict[str, set[str]] = {}
    for tensor, name in named.items():
        tensors.setdefault(name, set()).add(tensor)
    if odd := sorted(name for name in tensors if Path(name).name != name or not name.endswith(".safetensors")):
        return [_fault(f"{file}: {odd[0]!r}", "names of safetensors files in the same folder", AGAIN)]
    if lacking := sorted(name for name in tensors if not (folder / name).is_file()):
        what = f"{file}: {len(lacking)} of {len(tensors)} shards are not there, the first is {lacking[0]}"
        return [_fault(what, "every shard that it names", AGAIN)]
    for name, expected in sorted(tensors.items()):
        if absent := sorted(expected - _tensors_in(folder / name).keys()):
            what = f"{folder / name}: {len(absent)} tensors are not there, the first is {absent[0]}"
            return [_fault(what, f"every tensor that {INDEX} names", AGAIN)]
    return []


def _torn_faults(folder: Path) -> list[Fault]:
    """The first weights file that is none, or not as long as its header says."""
    for file in sorted(folder.glob("model*.safetensors")):
        size, whole = file.stat().st_size, _whole_size(file)
        if whole is None:
            return [_fault(f"{file}: {size} bytes that are no safetensors file", "the model's weights", AGAIN)]
        if size != whole:
            return [_fault(f"{file}: {size} bytes", f"the {whole} bytes that its header names", AGAIN)]
    return []


def _whole_size(file: Path) -> int | None:
    """How long a safetensors file must be; None where its header cannot be read."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                return None
            header = json.loads(opened.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(map(int, ends), default=0)
    except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return None


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a model's weights by name, from the headers of its files."""
    named = _read(folder / INDEX).get("weight_map")
    files = sorted(set(named.values())) if isinstance(named, dict) else ["model.safetensors"]
    return {tensor: stored for name in files for tensor, stored in _tensors_in(folder / name).items()}


def _tensors_in(file: Path) -> dict[str, StoredTensor]:
    """Of a safetensors file's header; empty where it has none that can be read."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length)) if length <= file.stat().st_size else {}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: StoredTensor(tuple(entry["shape"]), entry["dtype"]) for name, entry in tensors.items()}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return {}


def read_object(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none."""
    value = _value(file)
    return value if isinstance(value, dict) else None


def _read(file: Path) -> dict[str, Any]:
    return read_object(file) or {}


def _value(file: Path) -> Any:
    """What a JSON file holds; None where it cannot be read, which ``base_model`` tells of."""
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _sections(config: Mapping[str, Any], place: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration and those inside it, each with the way there (``text_config.``)."""
    yield place, config
    for key, value in config.items() if depth else ():
        if isinstance(value, dict):
            yield from _sections(value, f"{place}{key}.", depth - 1)


def _section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _fault(found: str, expected: str, hint: str) -> Fault:
    return Fault(KEY, found, expected, hint)
