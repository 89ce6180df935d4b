"""The frozen trunk's cache: the same losses, the same bits on hit and miss, and a folder that many may share."""

from __future__ import annotations

import ast
import contextlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters.inject import Mixture, NewAdapter, inject
from amlora_dist.adapters.settings import AdapterSettings
from amlora_dist.adapters.targets import find_targets
from amlora_dist.base_model import BaseModel, load_model, load_tokenizer
from amlora_dist.errors import UserError
from amlora_dist.evaluation.scoring import score_task
from amlora_dist.tasks.batches import Example, collate_prompts
from amlora_dist.training.batching import LossComputer, prompt_positions
from amlora_dist.training.trunk_cache import TrunkCache, make_room
from tests.tiny_config import write_model

WIDTH = 8


def base(folder: Path, kind: str = "llama") -> BaseModel:
    return BaseModel("tiny", None, folder, "0" * 64, kind == "t5", kind)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("trunk") / "model", "llama")


def mixture(folder: Path, layers: str = "above_router", dtype: torch.dtype = torch.float32) -> Mixture:
    model = load_model(base(folder), dtype=dtype)
    targets = find_targets(model, AdapterSettings(rank=4, layers=layers), 2)
    made = inject(model, targets, [], new=NewAdapter(task="new", rank=4, alpha=8.0, seed=3), router_layer=2)
    for name, parameter in made.trainable().items():
        if name.startswith("b."):
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return made


def cache_for(made: Mixture, folder: Path, limit: int = 10**9, dtype: torch.dtype = torch.float32) -> TrunkCache:
    return TrunkCache(made.trunk(), folder, limit=limit, dtype=dtype, decided_by={"base": "tiny"})


def examples(count: int = 6) -> list[Example]:
    draw = torch.Generator().manual_seed(0)
    rows = []
    for row in range(count):
        length = int(torch.randint(3, 12, (1,), generator=draw))
        prompt = tuple(torch.randint(3, 20, (length,), generator=draw).tolist())
        rows.append(Example(row=row, prompt=prompt, target=(3 + row, 1), label=0, answer="x"))
    return rows


def loss_and_gradients(made: Mixture, rows: list[Example], cache: TrunkCache | None) -> tuple[float, dict[str, Tensor]]:
    computer = LossComputer(made.model, pad_id=0, encoder_decoder=False, device=torch.device("cpu"))
    with contextlib.nullcontext() if cache is None else cache.attach(made.model):
        loss = computer(made.model, rows, torch.ones(1))
    for parameter in made.trainable().values():
        parameter.grad = None
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in made.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("layers", ["above_router", "last:1"])
def test_losses_and_gradients_are_those_without_a_cache(layers: str, folder: Path, tmp_path: Path) -> None:
    rows, exact = examples(), torch.float64  # processors round fp32 each in their own way
    plain, gradients = loss_and_gradients(mixture(folder, layers, exact), rows, None)
    cached = mixture(folder, layers, exact)
    cache = cache_for(cached, tmp_path, dtype=exact)
    assert cache.trunk.layer == {"above_router": 2, "last:1": 3}[layers]
    for _ in range(2):
        loss, found = loss_and_gradients(cached, rows, cache)
        assert loss == pytest.approx(plain, abs=1e-6)
        assert all(torch.allclose(found[name], gradients[name], atol=1e-6) for name in gradients)
    assert (cache.misses, cache.hits) == (6, 6)


def test_a_hit_and_a_miss_give_the_same_bits_in_any_company(folder: Path, tmp_path: Path) -> None:
    rows = [example.prompt for example in examples()]
    first = cache_for(mixture(folder), tmp_path / "one")
    alone = [first.states([row]) for row in rows]
    together = first.states(rows)
    other = cache_for(mixture(folder), tmp_path / "two").states(rows[::-1]).flip(0)
    for place, row in enumerate(rows):
        assert torch.equal(together[place, -len(row) :], alone[place][0])
        assert torch.equal(other[place, -len(row) :], alone[place][0])


@pytest.mark.parametrize("labels", [[(5, 6), (7,), (5, 8, 9)], None])
def test_scores_are_those_without_a_cache_and_decoding_goes_on_from_kept_keys(
    labels: list[tuple[int, ...]] | None, folder: Path, tmp_path: Path
) -> None:
    made = mixture(folder)
    tokenizer = load_tokenizer(folder)
    options: dict[str, Any] = {
        "tokenizer": tokenizer, "pad_id": 0, "eos_id": 1, "batch_size": 4, "labels": labels, "task_gate_row": 0, "tasks": 1,
        "metric": "accuracy" if labels else "token_f1", "max_new_tokens": None if labels else 6,
    }  # fmt: skip
    plain = score_task(made.model, examples(), **options)
    kept = TrunkCache(made.trunk(), tmp_path, limit=10**9, dtype=torch.float32, decided_by={}, decodes=True)
    ran: list[int] = []
    made.model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[1]))
    forward = kept.forward_for(made.model, examples())
    for _ in range(2):
        scored = score_task(made.model, examples(), **options, forward=forward)
        assert [p.output for p in scored] == [p.output for p in plain]
        for one, other in zip(scored, plain, strict=True):
            assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-5)
        prompts = {len(example.prompt) for example in examples()}
        assert set(ran) <= {1, 2} | (prompts if not kept.hits else set()), "the second time no prompt passes the trunk"
        ran.clear()
    assert (kept.misses, kept.hits) == (6, 6)
    assert kept.width == 32 + 2 * 2 * 2 * 8, "states, and keys and values of two layers with two heads of 8"
    long = Example(row=0, prompt=(1,) * 10**7, target=(), label=0, answer="")
    assert kept.forward_for(made.model, [long]) is made.model, "what does not fit is not cached"


def test_features_of_prompts_are_those_of_a_pass_up_to_the_routing_layer(folder: Path, tmp_path: Path) -> None:
    made = mixture(folder)
    batch = collate_prompts(examples(), pad_id=0, side="left")
    expected = made.routing_features(**batch, **prompt_positions(made.model, batch["attention_mask"], encoder_decoder=False))
    found = cache_for(made, tmp_path).features(examples(), skip_tokens=2)
    assert torch.allclose(found, expected, atol=1e-5)


def test_layers_below_are_not_run_when_states_are_there(folder: Path, tmp_path: Path) -> None:
    made = mixture(folder)
    cache, rows = cache_for(made, tmp_path), examples()
    loss_and_gradients(made, rows, cache)
    ran: list[int] = []
    for number, layer in enumerate(made.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
    loss_and_gradients(made, rows, cache)
    assert ran == [2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", ["above_router", "last:1"])
def test_passes_that_share_the_lower_layers_give_the_bits_of_passes_that_do_not(
    layers: str, dtype: torch.dtype, folder: Path
) -> None:
    made, rows = mixture(folder, layers, dtype), examples()
    computer = LossComputer(made.model, pad_id=0, encoder_decoder=False, device=torch.device("cpu"))
    gates = [torch.ones(1), torch.zeros(1)]
    plain = [float(computer(made.model, rows, gate).detach()) for gate in gates]
    ran: list[int] = []
    for number, layer in enumerate(made.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
    trunk = made.trunk()
    ran.clear()
    states = computer.lower_states(trunk, rows)
    assert [float(computer(made.model, rows, gate, states).detach()) for gate in gates] == plain
    assert ran == [*range(trunk.layer), *(2 * [*range(trunk.layer, 4)])], "the lower layers once"


def test_with_gradient_checkpointing_the_gradients_are_the_same(folder: Path, tmp_path: Path) -> None:
    exact = torch.float64
    _, gradients = loss_and_gradients(mixture(folder, dtype=exact), examples(), None)
    made = mixture(folder, dtype=exact)
    made.model.gradient_checkpointing_enable()
    made.model.train()
    _, found = loss_and_gradients(made, examples(), cache_for(made, tmp_path, dtype=exact))
    assert all(torch.allclose(found[name], gradients[name], atol=1e-6) for name in gradients)


def test_a_removed_mixture_leaves_the_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    made = mixture(folder)
    cache_for(made, tmp_path)
    model = made.model
    made.remove()
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_a_model_without_a_trunk_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapters\.layers"):
        mixture(folder, "all").trunk()


class Counting:
    """A trunk whose answer is made of the tokens."""

    layer, width = 2, WIDTH

    def __init__(self) -> None:
        self.calls = 0

    def states(self, tokens: tuple[int, ...]) -> Tensor:
        self.calls += 1
        return torch.tensor(tokens, dtype=torch.float32)[:, None].expand(-1, WIDTH).clone()


def counted(folder: Path, limit: int = 10**9, **decided_by: str) -> tuple[TrunkCache, Counting]:
    trunk: Any = Counting()
    return TrunkCache(trunk, folder, limit=limit, dtype=torch.float32, decided_by=decided_by), trunk


def stored(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*/*/*") if not file.name.startswith("."))


def test_what_one_process_kept_serves_another_and_another_base_has_files_of_its_own(tmp_path: Path) -> None:
    cache, _ = counted(tmp_path, base="a")
    cache.states([(1, 2, 3)])
    again, trunk = counted(tmp_path, base="a")
    assert again.states([(1, 2, 3)])[0, :, 0].tolist() == [1, 2, 3] and trunk.calls == 0
    other, trunk = counted(tmp_path, base="b")
    other.states([(1, 2, 3)])
    assert trunk.calls == 1


@pytest.mark.parametrize("damage", ["cut", "changed", "empty"])
def test_a_damaged_file_is_computed_again(damage: str, tmp_path: Path) -> None:
    counted(tmp_path)[0].states([(1, 2, 3)])
    (file,) = stored(tmp_path)
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-9], "changed": b"\1" + whole[1:], "empty": b""}[damage])
    cache, trunk = counted(tmp_path)
    assert cache.states([(1, 2, 3)])[0, :, 0].tolist() == [1, 2, 3] and trunk.calls == 1
    assert file.read_bytes() == whole


def test_past_the_limit_the_files_used_longest_ago_go(tmp_path: Path) -> None:
    cache, _ = counted(tmp_path)
    for token in range(10):
        cache.states([(token, token)])
    files = stored(tmp_path)
    for age, file in enumerate(files):
        os.utime(file, ns=(age, age))
    size = files[0].stat().st_size
    make_room(tmp_path, 5 * size)
    assert stored(tmp_path) == sorted(files[6:])
    make_room(tmp_path, 5 * size)
    assert len(stored(tmp_path)) == 4, "below the limit nothing goes"


def test_a_small_limit_holds_and_changes_no_result(tmp_path: Path) -> None:
    limit = 6 * (2 * WIDTH * 4 + 4)
    cache, _ = counted(tmp_path, limit=limit)
    for _ in range(3):
        for token in range(40):
            assert cache.states([(token, 7)])[0, 0, 0] == token
    assert sum(file.stat().st_size for file in stored(tmp_path)) <= 1.2 * limit


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    cache, trunk = counted(tmp_path / "file")
    assert cache.states([(4, 5)])[0, :, 0].tolist() == [4, 5] == cache.states([(4, 5)])[0, :, 0].tolist()
    assert trunk.calls == 2


def _fill(folder: str, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    cache, _ = counted(Path(folder), limit=20 * (2 * WIDTH * 4 + 4))
    for _ in range(300):
        token = int(torch.randint(0, 60, (1,), generator=draw))
        assert cache.states([(token, 9)])[0, 0, 0] == token


def test_several_workers_share_a_folder_while_files_come_and_go(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(str(tmp_path), seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not [file for file in tmp_path.glob("*/*/.*") if file.name != ".room"]


def test_nobody_but_the_stage_knows_of_the_cache() -> None:
    """Training, statistics, scoring and the layers call a model; whether a cache is in front of it is not theirs to know."""
    library = Path(__file__).resolve().parents[2] / "amlora_dist"

    def imports(file: Path) -> bool:
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        return any(isinstance(node, ast.ImportFrom) and node.module == "amlora_dist.training.trunk_cache" for node in nodes)

    assert [file.name for file in library.rglob("*.py") if imports(file)] == ["stage.py"]


def test_passes_that_keep_something_or_bring_their_states_are_the_models_own(folder: Path, tmp_path: Path) -> None:
    made = mixture(folder)
    cache = cache_for(made, tmp_path)
    row, gate = torch.tensor([[3, 4, 5]]), torch.ones(1, 1)
    inputs: dict[str, Any] = {"input_ids": row, "attention_mask": torch.ones_like(row), "task_gate": gate}
    expected = made.model(**inputs, use_cache=True).logits
    with cache.attach(made.model):
        assert torch.equal(made.model(**inputs, use_cache=True).logits, expected)
        made.model(**inputs, use_cache=False, trunk_states=made.trunk().states((3, 4, 5))[None])
        assert cache.misses == 0
        made.model(**inputs, use_cache=False)
    made.model(**inputs, use_cache=False)
    assert (cache.misses, cache.hits) == (1, 0), "taken away, it is asked no more"


def test_models_without_a_decoder_stay_without(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "t5", "t5")
    model = load_model(base(folder, "t5"), dtype=torch.float32)
    targets = find_targets(model, AdapterSettings(rank=4, targets=["q", "v"]), 2)
    made = inject(model, targets, [], new=NewAdapter(task="new", rank=4, alpha=8.0), router_layer=2)
    with pytest.raises(UserError, match="expected a decoder"):
        made.trunk()
