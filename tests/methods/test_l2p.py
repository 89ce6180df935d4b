"""The prompt pool as a method: it learns, its bank is served as it was scored, and what it cannot do has a message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from amlora_dist.adapters.settings import RouterSettings
from amlora_dist.config.loading import load_config
from amlora_dist.errors import BankError, FaultsError, UserError
from amlora_dist.evaluation.scoring import read_predictions
from amlora_dist.methods import method_for
from tests.methods.stages import Stage, stages
from tests.methods.test_methods import settings_for
from tests.tiny_config import write_config

SMALL = ["method=l2p", "method_settings.prompt_pool=6", "method_settings.prompt_tokens=3"]


def test_stages_leave_earlier_prompts_alone_and_pull_their_own_keys_to_their_inputs(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    # In format 1 the statistics are of what the pool's keys are matched with: the whole prompt.
    config = load_config(file, [*SMALL, "training.epochs=2", "prompt_format=1"])
    first, second = stages(config, tmp_path / "l2p", score=False)
    (path,) = first.result.adapter.a
    before, after = first.result.adapter, second.result.adapter
    assert torch.equal(before.a[path][:3], after.a[path][:3]) and torch.equal(before.b[path][:, :3], after.b[path][:, :3])
    assert not torch.equal(before.a[path][3:], after.a[path][3:]) and float(before.b[path][:, 3:].abs().max()) == 0.0

    def match(stage: Stage) -> torch.Tensor:
        return F.cosine_similarity(stage.result.adapter.a[path], stage.result.statistics.mean.float()[None], dim=1)

    assert float(match(first)[:3].min()) > float(match(first)[3:].max()) + 0.2
    untrained = F.cosine_similarity(before.a[path], second.result.statistics.mean.float()[None], dim=1)
    assert float((match(second) - untrained)[3:].min()) > 0.2


def test_a_pool_of_another_size_is_not_trained_on(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours",))
    (only,) = stages(load_config(file, [*SMALL, "training.epochs=1"]), tmp_path / "l2p", score=False)
    with pytest.raises(UserError, match=r"method_settings\.prompt_pool: found 160 prompts"):
        method_for(settings_for("l2p")).start_from([only.result.adapter])


def test_more_prompts_for_an_input_than_the_pool_has_are_refused(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours",))
    with pytest.raises(FaultsError, match="prompt_tokens 10 of a pool of 4"):
        load_config(file, ["method=l2p", "method_settings.prompt_pool=4"])


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_published_pool_answers_as_it_was_scored_and_has_no_other_form(
    kind: str, tmp_path: Path, amlora_home: Path
) -> None:
    from amlora_dist.inference.loading import bank_layers
    from amlora_dist.inference.model import AMLoRAModel
    from amlora_dist.registry.exports import export_peft
    from amlora_dist.registry.manifest import replace
    from pipelines.runs.progress import Silent
    from pipelines.runs.sequence import run_sequence

    file = write_config(tmp_path, kind, tasks=("colours", "shapes"))
    run_sequence(load_config(file, SMALL), run_id="pool", progress=Silent())
    model = AMLoRAModel.from_bank("models:/pool@current", device="cpu")
    scored = [read_predictions(found) for found in (amlora_home / "storage" / "scores").glob("*/predictions.jsonl")]
    rows = (tmp_path / "tasks" / "colours" / "test.jsonl").read_text().splitlines()
    texts = [json.loads(row)["text"] for row in rows]
    answers, written = model.predict(texts), model.predict(texts, free=True)
    assert (answers, written) in [([row.served for row in one], [row.output for row in one]) for one in scored]
    with pytest.raises(UserError, match="this bank holds prompts"):
        export_peft(tmp_path / "out", model.bank)
    with pytest.raises(UserError, match="this bank holds prompts"):
        model.to_peft("colours")
    manifest = model.bank.manifest
    assert {"layers", "form"}.isdisjoint(manifest.to_mapping()), "the method's name says what is loaded"
    about = manifest.training_configuration
    for section, fault in (({"prompt_pool": 6}, "prompt_tokens: missing"), ({"prompt_pool": 6, "prompt_tokens": 0}, "fit")):
        damaged = replace(manifest, training_configuration=about | {"method_settings": section})
        with pytest.raises(BankError, match=fault):
            bank_layers(damaged, RouterSettings())
