"""Where base models come from: a Hub id, a local folder, or a Python package that carries one.

Every source ends as a local folder of safetensors, whose digest (weights, configuration, tokenizer, chat template;
never the name of a revision) goes into fingerprints and manifests. ``torch`` and ``transformers`` are imported by
the functions that need them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass as plain_dataclass
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from amlora_dist.digests import file_digest, value_digest
from amlora_dist.errors import UserError, plain_reason
from amlora_dist.files import write_bytes
from amlora_dist.model_folder import AGAIN, folder_faults, read_object, short, size_faults, small_file_faults, stored_tensors
from amlora_dist.packaged_model import folder_of_package
from amlora_dist.quantisation import Quantisation, loading_options, settle

if TYPE_CHECKING:
    from collections.abc import Set

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")
"""``model_type`` of the architectures whose linear layers are transformers' ``Conv1D``."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt",
    "tokenizer_config.json",
)  # fmt: skip
DEFAULT_TEMPLATE = "additional_chat_templates/default.jinja"
_SMALL = ("*.json", "*.jinja")
_FLOATS = ("F32", "BF16", "F16", "F64")
_WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "merges.txt", "vocab.*")


Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True, slots=True)
class ModelSettings:
    """The base model, which never changes."""

    source: str
    """A Hub id, a local folder, or ``package:NAME`` for a package that carries a model."""
    revision: str | None = None
    """Commit or tag of a Hub repository; pin it."""
    attention: Attention = "auto"
    """transformers' attention implementation; ``auto``: eager on CPUs, where PyTorch's fused one trains several times
    slower, and sdpa on GPUs. What ``auto`` means is settled where the run starts, and kept with the run."""
    quantisation: Quantisation = "none"
    """Bits of the frozen linear layers: ``nf4`` (4, with the extra ``quantise``), ``int8`` or ``none``, as they are stored.
    Adapters stay in the run's dtype. A bank answers as it was measured on the quantisation that it was trained on."""


@plain_dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that lies in a local folder."""

    source: str
    revision: str | None
    path: Path
    digest: str
    encoder_decoder: bool
    model_type: str
    quantisation: Quantisation = "none"

    @property
    def identity(self) -> str:
        """What decides its features: the digest of its files, and how it is quantised where it is."""
        return identity(self.digest, self.quantisation)

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether its linear layers keep their weight as (d_in, d_out), PEFT's word for it."""
        return self.model_type in CONV1D_MODELS


def identity(digest: str, quantisation: str) -> str:
    """A base model's digest, or that of the same files in fewer bits: in everything that counts another model."""
    return digest if quantisation == "none" else value_digest({"base": digest, "quantisation": quantisation})


def resolve_base(settings: ModelSettings, home: Path) -> BaseModel:
    """Bring the source to a local folder and take its digest.

    Raises:
        UserError: the folder has no configuration or no safetensors weights, its weights are quantised or some are not
            there, it needs code of its own, the package is not installed, or the Hub does not answer.
    """
    source = settings.source
    if source.startswith("package:"):
        path = folder_of_package(source.removeprefix("package:"), home)
    elif Path(source).is_dir():
        path = Path(source).resolve()
    elif source.startswith((".", "/", "~")):
        raise UserError(f"model.source: no folder {source!r}; give an existing folder, a Hub id or package:NAME")
    else:
        path = _from_hub(source, settings.revision)
    return replace(described_base(settings, path), digest=folder_digest(path, home))


def described_base(settings: ModelSettings, path: Path) -> BaseModel:
    """The base model in a folder, by its small files: without a digest.

    Raises:
        UserError: as ``resolve_base`` of a folder.
    """
    config = _read_config(path, settings.source)
    _check_tokenizer(path)
    for fault in folder_faults(path, config):
        raise UserError(str(fault))
    return BaseModel(
        source=settings.source,
        revision=settings.revision,
        path=path,
        digest="",
        encoder_decoder=bool(config.get("is_encoder_decoder", False)),
        model_type=str(config.get("model_type") or ""),
        quantisation=settings.quantisation,
    )


def settled_attention(asked: Attention, *, gpu: bool) -> Attention:
    """The implementation that ``model.attention`` means on such a device."""
    if asked == "auto":
        return "sdpa" if gpu else "eager"
    return asked


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a base model; a missing padding token becomes the end-of-sequence token.

    Raises:
        UserError: its files are damaged, need a package that is not installed, or code of their own.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower, and each kind has errors of its own
        raise UserError(
            f"model.source: found a tokenizer in {path} that cannot be loaded ({short(error)}), expected one that "
            "transformers reads; fetch the model again, or save the tokenizer again with save_pretrained"
        ) from error
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, (int, float)):
        raise UserError(
            f"model.source: {path / 'tokenizer_config.json'}: model_max_length: found {str(longest)[:60]!a}, expected a"
            f" number of tokens; {AGAIN}"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(base: BaseModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """See that a model with so many rows in its embedding knows every token, and that answers can end.

    Raises:
        UserError: it does not; names the first token that has no row.
    """
    for fault in size_faults(base.path, tokenizer.get_vocab(), rows):
        raise UserError(str(fault))
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.source: found a tokenizer in {base.path} without an end-of-sequence token, which ends every answer; "
            "set eos_token in its tokenizer_config.json"
        )


def check_weights(base: BaseModel, model: PreTrainedModel) -> None:
    """Compare names and shapes of the stored tensors with a model (of any device), reading headers only.

    Weights that transformers joins or renames on its way in are left to it.

    Raises:
        UserError: a tensor is not there, or has another shape; names the first.
    """
    stored, prefix = stored_tensors(base.path), f"{model.base_model_prefix}."
    own: dict[int, list[str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):  # tied ones are stored under any of their names
        short_name = name.removeprefix(prefix)
        own.setdefault(id(parameter), []).extend([name, short_name, f"{prefix}{name}"])
        shapes |= dict.fromkeys((name, short_name, f"{prefix}{name}"), tuple(parameter.shape))
    for name, (_, dtype) in sorted(stored.items()):
        if name in shapes and dtype not in _FLOATS:
            raise UserError(
                f"model.source: {base.path}: {name}: found {dtype}, expected {', '.join(_FLOATS)}; quantised weights need"
                " their scales, give the folder of the model before it was quantised"
            )
    if _converted(model) or not stored:
        return
    for name, (shape, _) in sorted(stored.items()):
        if shapes.get(name, shape) != shape:
            raise UserError(
                f"model.source: {base.path}: {name}: found shape {shape}, expected {shapes[name]} as config.json says; "
                "the weights belong to another configuration, fetch the model again"
            )
    if beyond := _beyond(model, stored.keys() - shapes.keys(), shapes.keys()):
        raise UserError(
            f"model.source: {base.path}: found {len(beyond)} tensors of layers that config.json does not count, the first is"
            f" {beyond[0]}, expected as many layers as it says; fetch the model again"
        )
    if stored.keys() - shapes.keys():
        return  # names of old, which transformers may still know; what is lacking then is reported when it has loaded
    made = model._keys_to_ignore_on_load_missing or ()
    lacking = [names[0] for names in own.values() if not any(name in stored for name in names)]
    if lacking := sorted(name for name in lacking if not any(re.search(one, name) for one in made)):
        raise UserError(_lacking(base, model, lacking))


def _beyond(model: PreTrainedModel, stored: Set[str], own: Set[str]) -> list[str]:
    """Stored tensors of layers that the model has fewer of; without them it would be another model, unnoticed.
    Those that transformers leaves out on purpose (of a model's extra heads) are not among them."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    layers = {re.sub(r"\.\d+\.", ".*.", name) for name in own}
    found = (name for name in stored if re.sub(r"\.\d+\.", ".*.", name) in layers)
    return sorted(name for name in found if not any(re.search(one, name) for one in ignored))


def _lacking(base: BaseModel, model: PreTrainedModel, names: list[str]) -> str:
    return (
        f"model.source: the weights in {base.path} lack {len(names)} tensors of {type(model).__name__}, the first is"
        f" {names[0]}; give the folder of the whole model"
    )


def _converted(model: PreTrainedModel) -> bool:
    """Whether transformers has rules that make this model's parameters of tensors with other names."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # a version that keeps its rules elsewhere
        return True
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def load_model(
    base: BaseModel, *, dtype: torch.dtype, attention: str = "sdpa", device: torch.device | None = None
) -> PreTrainedModel:
    """The base model with every parameter frozen, in evaluation mode, on the CPU (or partitioned under ZeRO-3); one that is
    quantised on ``device``, where it is quantised.

    Raises:
        UserError: the weights lack some of the model's tensors, which transformers would draw at random; or they need a
            package that is not installed.
    """
    options = model_options(base, dtype=dtype, attention=attention) | loading_options(base.quantisation, dtype, device)
    try:
        model, info = auto_class(base).from_pretrained(
            base.path, use_safetensors=True, output_loading_info=True, trust_remote_code=False, **options
        )
    except (ImportError, KeyError, ValueError) as error:
        raise UserError(f"model.source: {base.path} cannot be loaded ({short(error)}); fetch the model again") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # how transformers says it; others are the machine's
            raise
        raise UserError(f"model.source: {base.path}: its weights have other shapes than config.json; {AGAIN}") from error
    if lacking := sorted(info["missing_keys"] & dict(model.named_parameters()).keys()):
        raise UserError(_lacking(base, model, lacking))
    settle(model, dtype)
    return frozen(model)


def auto_class(base: BaseModel) -> Any:
    """transformers' class that makes models of this kind."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if base.encoder_decoder else AutoModelForCausalLM


def model_options(base: BaseModel, *, dtype: torch.dtype, attention: str) -> dict[str, Any]:
    """How the class is to make it."""
    implementation = "eager" if base.model_type in {"t5", "mt5", "umt5"} else attention
    return {"dtype": dtype, "attn_implementation": implementation}


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    """The model ready to be adapted: nothing trains, evaluation mode."""
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_contiguous)
    return model.eval()


def _contiguous(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """transformers cuts ``logits_to_keep`` out as a view, on which a bf16 product on the CPU is 200 times slower."""
    return (args[0].contiguous(), *args[1:])


def meta_model(base: BaseModel) -> PreTrainedModel:
    """The model's modules without weights (meta device): enough to find target layers before anything is loaded.

    Raises:
        UserError: transformers knows no language model of this kind, or none of these sizes.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(base.path, trust_remote_code=False)
        with torch.device("meta"):
            made = auto_class(base).from_config(config, attn_implementation="eager", trust_remote_code=False)
        model: PreTrainedModel = made
        return model
    except making_errors() as error:
        kind = "an encoder-decoder" if base.encoder_decoder else "a causal"
        if _known(base):
            raise UserError(
                f"model.source: {base.path / 'config.json'}: found values that make no {base.model_type} model"
                f" ({short(error)}), expected its configuration; fetch the model again"
            ) from error
        raise UserError(
            f"model.source: found model_type {base.model_type!r} in {base.path / 'config.json'}, expected {kind} language"
            f" model that transformers {transformers.__version__} can make; give another model, or upgrade transformers"
        ) from error


def making_errors() -> tuple[type[Exception], ...]:
    """What transformers' models raise, each kind in its own way, when they are made of values that do not fit."""
    from huggingface_hub.errors import StrictDataclassError

    plain = (AssertionError, ArithmeticError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError)
    return (StrictDataclassError, *plain, ValueError)


def _known(base: BaseModel) -> bool:
    """Whether transformers has language models of this kind, whatever their sizes."""
    from transformers.models.auto import modeling_auto as auto

    both = auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return base.model_type in both[0 if base.encoder_decoder else 1]


def folder_digest(path: Path, home: Path, *, as_before: bool = False) -> str:
    """sha256 over names and contents of the folder's model files, cached by size and modification time.

    Args:
        path: of the folder.
        home: whose cache is used.
        as_before: without the few files that 0.1 did not cover (``_read_elsewhere``), which its banks do not know.

    Raises:
        UserError: a file is cut off.
    """
    kinds = {".safetensors", ".json", ".model", ".txt", ".jinja"}
    files = {f.name: f for f in path.iterdir() if f.is_file() and f.suffix in kinds}
    if not as_before:
        files |= _read_elsewhere(path)
    sizes = [(name, f.stat().st_size, f.stat().st_mtime_ns) for name, f in sorted(files.items())]
    stamp = value_digest([str(path), sizes])
    cached = home / "cache" / "model-digests" / f"{stamp}.txt"
    if cached.is_file() and len(known := cached.read_text().strip()) == 64:
        return known
    for file in files.values():
        _check_whole(file)
    digest = value_digest([(name, file_digest(f)) for name, f in sorted(files.items())])
    write_bytes(cached, digest.encode())
    return digest


def _read_elsewhere(path: Path) -> dict[str, Path]:
    """Files that few models have and transformers reads where they are: the default of several chat templates, and where
    there is no ``tokenizer.json`` the vocabularies of Marian, PhoBERT and Mistral's own tokenizers."""
    found = {name: path / name for name in (DEFAULT_TEMPLATE,) if (path / name).is_file()}
    if not (path / "tokenizer.json").is_file():
        odd = (f for f in path.iterdir() if f.suffix in (".spm", ".codes") or f.name.startswith("tokenizer.model."))
        found |= {f.name: f for f in odd if f.is_file()}
    return found


def _check_whole(file: Path) -> None:
    """Raise UserError where JSON, or a safetensors file by what its header says, does not reach its end."""
    size = file.stat().st_size
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix == ".safetensors":
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length)) if length <= size else None
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"] if header else []
            if header is None or size != 8 + length + max(ends, default=0):
                raise ValueError
    except OSError as error:
        raise UserError(f"model.source: {file}: cannot be read ({plain_reason(error)})") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        kind = "JSON" if file.suffix == ".json" else "a whole safetensors file"
        raise UserError(f"model.source: {file}: found {size} bytes, expected {kind}; fetch the model again") from error


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"model.source: found no tokenizer in {path}, expected one of {', '.join(_TOKENIZERS)}; save it next to the"
            " model with save_pretrained"
        )


def _read_config(path: Path, source: str) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"model.source: {source!r} has no config.json in {path}; give a transformers model folder")
    if not any((path / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"model.source: {source!r} has no weights in {path}: expected model.safetensors or "
            "model.safetensors.index.json (pickled weights are not read; convert them with save_pretrained)"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model.source: {file}: cannot be read ({plain_reason(error)})") from error
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 too
        raise UserError(f"model.source: {file}: found no JSON ({short(error)}); fetch the model again") from error
    if not isinstance(config, dict):
        raise UserError(f"model.source: {file}: found no JSON object, expected a configuration; {AGAIN}")
    return config


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        small = Path(snapshot_download(repository, revision=revision, allow_patterns=list(_SMALL)))
        for fault in small_file_faults(small, read_object(small / "config.json") or {}):
            raise UserError(str(fault))  # before gigabytes are fetched
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(_WANTED)))
    except HFValidationError as error:
        raise UserError(f"model.source: {repository!r} is neither a folder nor a Hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.source: cannot fetch {repository!r} (revision {revision or 'main'}) from the Hub: {error}; "
            "check the name, your network and token, or give a local folder"
        ) from error
