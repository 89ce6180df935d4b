"""Kinds of base models that cannot be had: what is wrong with a folder, and what a message must say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests.pipelines.bad_inputs import Damage, Fault, of_task, with_model

CODE = "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\n"
OWN_CODE = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
NEVER = "code that comes with a model is never run"
WHOLE = "give the folder of the model before it was quantised"
AGAIN = "fetch the model again"


def changed(file: Path, **values: Any) -> None:
    """Change top-level keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def configured(**values: Any) -> Damage:
    """A model folder whose config.json says something else."""
    return with_model(lambda own: changed(own / "config.json", **values))


def with_code(own: Path, **values: Any) -> None:
    """A model folder that brings code, which leaves a file when it runs."""
    (own / "modeling_own.py").write_text(CODE, encoding="utf-8")
    changed(own / "config.json", auto_map=OWN_CODE, **values)


def tokenizer_with_code(own: Path) -> None:
    (own / "tokenization_own.py").write_text(CODE, encoding="utf-8")
    own_class = {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}, "tokenizer_class": "OwnTokenizer"}
    changed(own / "tokenizer_config.json", **own_class)


def more_tokens(own: Path) -> None:
    tokenizer = Tokenizer.from_file(str(own / "tokenizer.json"))
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save(str(own / "tokenizer.json"))


def odd_tokenizer(own: Path) -> None:
    value = json.loads((own / "tokenizer.json").read_text(encoding="utf-8"))
    changed(own / "tokenizer.json", model=value["model"] | {"type": "Next"})


def in_shards(own: Path) -> dict[str, str]:
    """The weights in two files with an index."""
    weights = load_file(own / "model.safetensors")
    names = {tensor: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, tensor in enumerate(sorted(weights))}
    for name in set(names.values()):
        save_file({t: weights[t] for t in weights if names[t] == name}, own / name, metadata={"format": "pt"})
    (own / "model.safetensors").unlink()
    (own / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}), encoding="utf-8")
    return names


def sharded(spoil: Callable[[Path, dict[str, str]], object]) -> Damage:
    return with_model(lambda own: spoil(own, in_shards(own)))


def index(own: Path, weight_map: object) -> None:
    changed(own / "model.safetensors.index.json", weight_map=weight_map)


def in_bytes(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    rounded = {name: tensor.to(torch.int8) if "q_proj" in name else tensor for name, tensor in weights.items()}
    save_file(rounded, own / "model.safetensors", metadata={"format": "pt"})


def one_tensor_less(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})


def one_row_less(own: Path) -> None:
    weights = load_file(own / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:-1].clone()
    save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
    changed(own / "config.json", vocab_size=35)


def fault(value: str, fix: str, file: str = "{folder}/model-own") -> Fault:
    return Fault(file, "model.source:", value, fix)


CONFIG = "{folder}/model-own/config.json"
MODELS: dict[str, tuple[Damage, Fault]] = {
    "remote-code": (
        with_model(lambda own: with_code(own, model_type="own", architectures=["OwnForCausalLM"])),
        fault("auto_map: code of its own for OwnForCausalLM", NEVER, CONFIG),
    ),
    "remote-code under the name of a known kind": (
        with_model(lambda own: with_code(own, architectures=["OwnForCausalLM"])),
        fault("auto_map: code of its own for OwnForCausalLM", NEVER, CONFIG),
    ),
    "remote-code in an inner configuration": (
        configured(vision_config={"auto_map": OWN_CODE}), fault("vision_config.auto_map: code of its own", NEVER, CONFIG)
    ),
    "remote-code of a tokenizer": (
        with_model(tokenizer_with_code), fault("auto_map: code of its own for tokenizer_class 'OwnTokenizer'", NEVER)
    ),
    "remote-code of a kernel on the Hub": (
        configured(attn_implementation="somebody/their-attention"),
        fault("attn_implementation: somebody/their-attention", "code from elsewhere is never run", CONFIG),
    ),
    "remote-code of a kernel, for a part": (
        configured(text_config={"_attn_implementation": {"": "paged|somebody/their-attention@main:f"}}),
        fault("text_config._attn_implementation:", "code from elsewhere is never run", CONFIG),
    ),
    "tokenizer-larger": (
        with_model(more_tokens),
        fault("'<one>' is number 36, expected numbers below 36", "the tokenizer that the model was trained with"),
    ),
    "tokenizer-larger than a smaller embedding": (
        with_model(one_row_less), fault("expected numbers below 35", "resize_token_embeddings")
    ),
    "quantised-folder": (
        configured(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        fault("quantization_config: weights quantised with bitsandbytes", WHOLE, CONFIG),
    ),
    "quantised-folder of GPTQ": (
        configured(quantization_config={"quant_method": "gptq", "bits": 4}), fault("quantised with gptq", WHOLE, CONFIG)
    ),
    "quantised-folder of AWQ": (
        configured(quantization_config={"quant_method": "awq", "bits": 4}), fault("quantised with awq", WHOLE, CONFIG)
    ),
    "quantised-folder in 8 bits": (
        configured(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
        fault("quantization_config: weights quantised with bitsandbytes", "model.quantisation quantises it", CONFIG),
    ),
    "quantised-folder in an inner configuration": (
        configured(text_config={"quantization_config": {"quant_method": "fp8"}}),
        fault("text_config.quantization_config: weights quantised with fp8", WHOLE, CONFIG),
    ),
    "quantised-folder from before transformers had a key": (
        with_model(lambda own: (own / "quantize_config.json").write_text("{}", encoding="utf-8")),
        fault("quantize_config.json: quantised weights", WHOLE),
    ),
    "quantised-folder without a word of it": (
        with_model(in_bytes), fault("self_attn.q_proj.weight: found I8, expected F32, BF16, F16, F64", WHOLE)
    ),
    "quantised-folder: a shard missing": (
        sharded(lambda own, names: (own / names["lm_head.weight"]).unlink()),
        fault("1 of 2 shards are not there, the first is model-00001-of-00002.safetensors", AGAIN),
    ),
    "a shard without its tensor": (
        sharded(lambda own, names: index(own, names | {"model.more.weight": names["lm_head.weight"]})),
        fault("1 tensors are not there, the first is model.more.weight", AGAIN),
    ),
    "an index that leads out of the folder": (
        sharded(lambda own, names: index(own, names | {"lm_head.weight": "../model-llama/model.safetensors"})),
        fault("'../model-llama/model.safetensors', expected names of safetensors files in the same folder", AGAIN),
    ),
    "an index without tensors": (sharded(lambda own, names: index(own, [])), fault("no weight_map", AGAIN)),
    "weights that lack a tensor": (
        with_model(one_tensor_less),
        fault("lack 1 tensors of LlamaForCausalLM, the first is model.norm.weight", "the folder of the whole model"),
    ),
    "weights of other sizes": (
        configured(intermediate_size=40),
        fault("mlp.down_proj.weight: found shape (32, 48), expected (32, 40) as config.json says", AGAIN),
    ),
    "sizes that make no model": (
        configured(num_attention_heads=5), fault("is not a multiple of the number of attention heads (5)", AGAIN, CONFIG)
    ),
    "more layers than any model": (
        configured(num_hidden_layers=2**31), fault("num_hidden_layers: 2147483648", "expected at most 10000", CONFIG)
    ),
    "more labels than any model": (
        configured(num_labels=10**8), fault("num_labels: 100000000", "expected at most 10000", CONFIG)
    ),
    "more layers in an inner configuration": (
        configured(text_config={"num_layers": 10**40}), fault("text_config.num_layers: 1000", "at most 10000", CONFIG)
    ),
    "fewer layers than the weights have": (
        configured(num_hidden_layers=2),
        fault("found 18 tensors of layers that config.json does not count", "the first is model.layers.2."),
    ),
    "a token to generate that is no number": (
        with_model(lambda own: changed(own / "generation_config.json", pad_token_id="</s>")),
        fault("generation_config.json: pad_token_id: '</s>'", "expected the number of a token"),
    ),
    "tokens to end with that are no numbers": (
        with_model(lambda own: changed(own / "generation_config.json", eos_token_id=[1, {}])),
        fault("generation_config.json: eos_token_id: '[1, {{}}]'", "expected the number of a token"),
    ),
    "a tokenizer's length in words": (
        with_model(lambda own: changed(own / "tokenizer_config.json", model_max_length="long")),
        fault("tokenizer_config.json: model_max_length: found 'long'", "expected a number of tokens"),
    ),
    "a size in words": (
        configured(num_attention_heads="four"), fault("expected int, got str (value: 'four')", AGAIN, CONFIG)
    ),
    "a kind of model that is no name": (
        configured(model_type=["llama"]), fault("\"['llama']\"", "upgrade transformers", CONFIG)
    ),
    "a decoder that says it has an encoder": (
        configured(is_encoder_decoder=True),
        fault("expected an encoder-decoder language model", "give another model", CONFIG),
    ),
    "quantised-folder: a broken tokenizer.json": (
        with_model(odd_tokenizer),
        fault("a tokenizer in {folder}/model-own/tokenizer.json that cannot be loaded", AGAIN),
    ),
    "a tokenizer's settings in a list": (
        with_model(lambda own: (own / "tokenizer_config.json").write_text("[]", encoding="utf-8")),
        fault("tokenizer_config.json: no JSON object", AGAIN),
    ),
    "generation settings in a list": (
        with_model(lambda own: (own / "generation_config.json").write_text("[]", encoding="utf-8")),
        fault("generation_config.json: no JSON object", AGAIN),
    ),
    "a tokenizer that ends no answer": (
        with_model(lambda own: changed(own / "tokenizer_config.json", eos_token=None)),
        fault("without an end-of-sequence token", "set eos_token in its tokenizer_config.json"),
    ),
    "a configuration that is not UTF-8": (
        with_model(lambda own: (own / "config.json").write_bytes(b'{"model_type": "\xff"}')),
        fault("found no JSON object in '{folder}/model-own/config.json'", AGAIN, CONFIG),
    ),
    "an adapter inside of a model": (
        with_model(lambda own: (own / "adapter_config.json").write_text("{}", encoding="utf-8")),
        fault("adapter_config.json: an adapter inside of the model", "take its files away"),
    ),
    # -- what only model and task together are
    "labels of the same tokens": (
        of_task({"labels": ["red", {"value": "green", "text": "gryn"}, {"value": "blue", "text": "bloo"}]}),
        Fault("tasks/colours.yaml", "labels:", "'bloo' of task 'colours', which has the same tokens as 'gryn'", "another"),
    ),
    "no room for a text": (
        of_task({"prompt": {"question": "what " * 30}}),
        Fault("tasks/colours.yaml", "max_length 24 is too small", "the prompt has 32 tokens", "without any text"),
    ),
}  # fmt: skip
