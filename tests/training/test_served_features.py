"""What training's statistics hold of a row is what serving routes on: the text's own features, whatever is around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.adapters.inject import inject
from amlora_dist.adapters.keyed_router import keyed_router
from amlora_dist.adapters.settings import AdapterSettings, GateSettings, RouterSettings
from amlora_dist.adapters.statistics import HeldOut
from amlora_dist.adapters.targets import default_depths, default_router_layer, find_targets
from amlora_dist.base_model import ModelSettings, load_model, load_tokenizer, resolve_base
from amlora_dist.config.loading import load_config
from amlora_dist.evaluation.answering import Answering
from amlora_dist.evaluation.decoding import Decoder
from amlora_dist.evaluation.requests import Prompter, Request, mean_rows
from amlora_dist.tasks.batches import encode
from amlora_dist.tasks.chat import settled
from amlora_dist.tasks.prompt_format import PromptFormat
from amlora_dist.tasks.prompts import BANK_TEMPLATE, template_for
from amlora_dist.tasks.sources import load_task
from amlora_dist.tasks.task import resolve_task
from amlora_dist.tasks.task_entry import task_entry
from amlora_dist.training.engine import Alone
from amlora_dist.training.stage_statistics import StageStatistics, sampled_places
from amlora_dist.training.worker_cache import WorkerCache
from tests.bank_with_base import random_adapter
from tests.tiny_chat import write_chat_model, write_conversations
from tests.tiny_config import TARGETS, write_model, write_task

FIRST = {style: {"prompt_style": style} for style in ("bare", "question", "options")}
LATER = {"named": {"prompt_style": "named"}, "custom": {"prompt": {"template": "Answer what {{ text }} , the Answer:"}}}
CASES = [
    *(pytest.param("llama", change, True, id=f"decoder, {name}") for name, change in FIRST.items()),
    *(pytest.param("llama", change, False, id=f"decoder, {name}") for name, change in LATER.items()),
    *(pytest.param("t5", change, True, id=f"encoder-decoder, {name}") for name, change in FIRST.items()),
    *(pytest.param("t5", change, False, id=f"encoder-decoder, {name}") for name, change in LATER.items()),
    pytest.param("chat", {"prompt": {"format": "chat", "system": "You see."}}, False, id="chat, labels"),
    pytest.param("chat", None, False, id="chat, conversations"),
]
FORMAT = PromptFormat(2, 24)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "t5"):
        write_model(folder / kind, kind)
    write_chat_model(folder / "chat")
    return folder


@pytest.mark.parametrize(("kind", "change", "first"), CASES)
def test_features_of_training_are_those_of_serving(
    kind: str, change: dict[str, Any] | None, first: bool, bases: Path, tmp_path: Path
) -> None:
    file = write_conversations(tmp_path / "talk") if change is None else write_task(tmp_path, "colours")
    base = resolve_base(ModelSettings(source=str(bases / kind)), tmp_path / "home")
    model, tokenizer = load_model(base, dtype=torch.float32).eval(), load_tokenizer(base.path)
    asked: Any = {"task": str(file), "prompt": {"question": "what ?"}, "max_length": 160} | (change or {})
    if change is not None and "prompt" in change:
        asked["prompt"] = {"question": "what ?"} | change["prompt"]
    config = {"name": "x", "model": {"source": str(bases / kind)}, "tasks": [asked]}
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    loaded = load_config(tmp_path / "run.yaml")
    found = resolve_task(loaded.tasks[0], base_dir=tmp_path, defaults=loaded.task_defaults)
    data = load_task(settled(found, tokenizer, encoder_decoder=base.encoder_decoder))
    spec, rows = data.spec, data.rows["train"]
    assert spec.chat == (kind == "chat")

    # As a stage reads its rows.
    layer = default_router_layer(model)
    targets = find_targets(model, AdapterSettings(targets=TARGETS["t5" if kind == "t5" else "llama"]), layer)
    adapters = [random_adapter(spec.name, 1, targets, rank=2, recipe=False, literal=False)]
    mixture = inject(model, targets, adapters, router_layer=layer, depths=default_depths(layer))
    settings = RouterSettings(holdout=0.25)
    makes = StageStatistics(
        spec.name, 0, settings, tokenizer, base.encoder_decoder, Alone(), torch.device("cpu"), whole=False, text_alone=True,
        cache=WorkerCache(),
    )  # fmt: skip
    examples = encode(
        rows, spec, template_for(spec, spec.prompt_style), tokenizer, max_length=160, encoder_decoder=base.encoder_decoder,
        prompt_format=FORMAT,
    )  # fmt: skip
    labels = len(spec.label_texts)
    statistics = makes.of(mixture, examples, [], None, labels)
    assert isinstance(statistics.held, HeldOut) and len(statistics.held.labels) >= 6

    # As the finished bank reads the same texts, on their way to an answer.
    depths = len(default_depths(layer)) + 1
    router = keyed_router([statistics], rule="label", shrinkage=None, gate=GateSettings(), depths=depths)
    mixture.set_router(router)
    prompter = Prompter(
        {spec.name: task_entry(spec)}, BANK_TEMPLATE, tokenizer, encoder_decoder=base.encoder_decoder,
        positions=getattr(model.config, "max_position_embeddings", None), prompt_format=FORMAT,
    )  # fmt: skip
    decoder = Decoder(
        model, pad_id=int(tokenizer.pad_token_id), eos_id=int(tokenizer.eos_token_id), encoder_decoder=base.encoder_decoder
    )
    answering = Answering(mixture, decoder, prompter, router, device=torch.device("cpu"), rows_TN=mean_rows(adapters))
    queries = [prompter.query([*row.turns[:-1]] if row.turns else row.text) for row in rows]
    places = makes.held_out(len(rows))
    kept = [place for place in range(len(rows)) if place not in places]

    def served(chosen: list[int]) -> torch.Tensor:
        requests = [Request(n, queries[place].text, turns=queries[place].turns) for n, place in enumerate(chosen)]
        begun = answering.begin(requests)
        assert all((request.reused is not None) == first for request in requests), "whether the prompt begins with the text"
        return begun.features_BF

    torch.testing.assert_close(served(places), statistics.held.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(served(kept).double().mean(dim=0), statistics.mean, atol=1e-5, rtol=1e-5)
    sampled = [kept[place] for place in sampled_places(len(kept), seed=0, task=spec.name)]
    assert statistics.sample is not None
    torch.testing.assert_close(served(sampled), statistics.sample.features, atol=1e-5, rtol=1e-5)
    answering._trunk = None  # read for its features alone, as models are whose lower half cannot be kept
    torch.testing.assert_close(served(places), statistics.held.features, atol=1e-5, rtol=1e-5)
