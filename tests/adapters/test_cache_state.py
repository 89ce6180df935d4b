"""What carries a gate from call to call: KV caches and encoder outputs, through generation of every kind."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.modeling_outputs import BaseModelOutput

from amlora_dist.adapters.gate_context import CacheState, cache_state_of, set_cache_state
from amlora_dist.adapters.inject import Mixture, inject
from amlora_dist.adapters.selector_layer import Selectors
from amlora_dist.adapters.settings import LiteralSettings
from amlora_dist.errors import UserError
from tests.adapters.banks import (
    RANKS,
    gate_of,
    padded,
    prompts,
    random_adapters,
    routed,
    targets_of,
    tiny_llama,
    tiny_t5,
)

# -- generation -------------------------------------------------------------------------------------------------------


def generate(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model.generate(**({"max_new_tokens": 7, "do_sample": False} | inputs))


@pytest.mark.parametrize("layers", ["above_router", "all"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_is_the_same_with_and_without_cache(layers: str, options: dict[str, Any]) -> None:
    model = tiny_llama()
    routed(model, layers=layers)
    cached = generate(model, **padded(), **options)
    assert torch.equal(cached, generate(model, **padded(), use_cache=False, **options))


def test_generate_routes_once_and_every_row_by_its_own_prompt() -> None:
    model = tiny_llama()
    mixture = routed(model)
    seen: list[Tensor] = []
    together = generate(model, **padded(), on_route=lambda _f, gate: seen.append(gate))
    assert len(seen) == 1
    for row in range(3):
        inputs = {name: tensor[row : row + 1] for name, tensor in padded().items()}
        alone = generate(model, **inputs)
        assert torch.equal(alone[0], together[row])
        torch.testing.assert_close(gate_of(mixture, **inputs), seen[0][row : row + 1], atol=1e-5, rtol=0)


def test_generate_takes_a_gate() -> None:
    model = tiny_llama()
    mixture = routed(model)
    gate = mixture.one_hot(1, 3)
    given = generate(model, **padded(), task_gate=gate, num_beams=2)
    mixture.set_router(None)
    assert torch.equal(given, generate(model, **padded(), task_gate=gate, num_beams=2, use_cache=False))


def test_generate_works_with_a_static_cache() -> None:
    model = tiny_llama()
    routed(model)
    assert torch.equal(generate(model, **padded()), generate(model, **padded(), cache_implementation="static"))


def test_a_prompt_that_is_read_in_chunks_is_routed_as_a_whole() -> None:
    model = tiny_llama()
    routed(model)
    inputs = {"input_ids": prompts(2, 9)}
    assert torch.equal(generate(model, **inputs), generate(model, **inputs, prefill_chunk_size=4))


def test_interleaved_generations_do_not_mix_gates() -> None:
    model = tiny_llama()
    routed(model)
    batches = [prompts(2, 6, seed=seed) for seed in (1, 2)]
    expected = [generate(model, input_ids=ids)[:, 6:] for ids in batches]
    caches: list[Any] = [None, None]
    tokens = list(batches)
    produced: list[list[Tensor]] = [[], []]
    with torch.no_grad():
        for _step in range(7):
            for i in (0, 1):
                out = model(input_ids=tokens[i], past_key_values=caches[i], use_cache=True)
                caches[i], tokens[i] = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
                produced[i].append(tokens[i])
    for i in (0, 1):
        assert torch.equal(torch.cat(produced[i], dim=1), expected[i])


def test_two_threads_do_not_mix_gates() -> None:
    model = tiny_llama()
    routed(model)
    batches = [prompts(2, 6, seed=seed) for seed in range(4)]
    expected = [generate(model, input_ids=ids) for ids in batches]
    found: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(batches))

    def work(i: int) -> None:
        barrier.wait(timeout=30)
        for _ in range(3):
            found[i] = generate(model, input_ids=batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert all(torch.equal(found[i], expected[i]) for i in range(len(batches)))


# -- what the cache carries -------------------------------------------------------------------------------------------


def filled(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


def gate_in(cache: object) -> Tensor:
    cache_state = cache_state_of(cache)
    assert cache_state is not None
    assert cache_state.task_gate is not None
    return cache_state.task_gate


def test_decoding_reads_the_adapters_that_the_gate_reaches_and_no_others() -> None:
    model = tiny_llama()
    targets = targets_of(model, layers="all")
    mixture = inject(model, targets, random_adapters(targets, RANKS, recipes=False), router=None)
    one_hot = torch.eye(len(RANKS))
    for gate in (one_hot[[1, 1, 2]], one_hot[[0, 2, 0]], 0 * one_hot[[0, 0, 0]], torch.rand(3, len(RANKS))):
        with torch.no_grad():
            cache = model(input_ids=prompts(3, 5), task_gate=gate, use_cache=True).past_key_values
            assert cache_state_of(cache).cached_gate is None, "nothing was decoded yet"  # type: ignore[union-attr]
            step = model(input_ids=prompts(3, 2), past_key_values=copy.deepcopy(cache)).logits
            whole = model(input_ids=torch.cat([prompts(3, 5), prompts(3, 2)], dim=1), task_gate=gate).logits[:, 5:]
            torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-5)
            model(input_ids=prompts(3, 1), past_key_values=cache)
        kept = cache_state_of(cache).cached_gate  # type: ignore[union-attr]
        assert kept is not None and len(kept.layers) == len(mixture.modules)
        used = [task for task in range(len(RANKS)) if gate[:, task].any()]
        ranks = sum(RANKS[used[0] : used[-1] + 1]) if used else 0
        for _, gates, parts in kept.layers.values():
            assert gates.shape == (3, ranks) and sum(a.shape[0] for a, _ in parts) == ranks
        assert copy.deepcopy(cache).cache_state.cached_gate.layers == {}, "weights are not copied with a cache"
        cache.batch_select_indices(torch.tensor([2, 0]))
        assert cache_state_of(cache).cached_gate is None, "other rows, another gate"  # type: ignore[union-attr]


def test_a_silent_adapter_is_silent_in_the_middle_of_decoding() -> None:
    model = tiny_llama()
    targets = targets_of(model, layers="all")
    mixture = inject(model, targets, random_adapters(targets, RANKS, recipes=False), router=None)
    with torch.no_grad():
        gate = torch.eye(len(RANKS))[[1, 1, 1]]
        cache = model(input_ids=prompts(3, 5), task_gate=gate, use_cache=True).past_key_values
        model(input_ids=prompts(3, 1), past_key_values=cache)
        assert all(parts for _, _, parts in cache_state_of(cache).cached_gate.layers.values())  # type: ignore[union-attr]
        mixture.disable_adapter(1)
        model(input_ids=prompts(3, 1), past_key_values=cache)
        assert not any(gates.any() for _, gates, _ in cache_state_of(cache).cached_gate.layers.values())  # type: ignore[union-attr]
        mixture.disable_adapter(None)
        model(input_ids=prompts(3, 1), past_key_values=cache)
        assert all(gates.any() for _, gates, _ in cache_state_of(cache).cached_gate.layers.values())  # type: ignore[union-attr]


def test_the_gate_follows_every_operation_on_the_caches_rows() -> None:
    model = tiny_llama()
    routed(model)
    cache = filled(model, prompts(3, 5))
    gate = gate_in(cache)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert torch.equal(gate_in(cache), gate[[2, 0, 0]])
    cache.batch_repeat_interleave(2)
    assert torch.equal(gate_in(cache), gate[[2, 2, 0, 0, 0, 0]])
    cache.batch_select_indices(torch.tensor([1, 5]))
    assert torch.equal(gate_in(cache), gate[[2, 0]])
    cache.crop(-2)
    assert torch.equal(gate_in(cache), gate[[2, 0]])
    assert isinstance(cache, DynamicCache)


def test_decoding_goes_on_with_the_rows_that_were_picked() -> None:
    model = tiny_llama()
    routed(model)
    ids, token = prompts(3, 5), prompts(2, 1, seed=4)
    cache = filled(model, ids)
    cache.batch_select_indices(torch.tensor([2, 0]))
    with torch.no_grad():
        picked = model(input_ids=token, past_key_values=cache).logits
        again = model(input_ids=token, past_key_values=filled(model, ids[[2, 0]])).logits
    torch.testing.assert_close(picked, again, atol=1e-6, rtol=1e-5)


def test_a_copied_cache_has_a_gate_of_its_own() -> None:
    model = tiny_llama()
    routed(model)
    cache = filled(model, prompts(2, 5))
    twin = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(gate_in(twin), gate_in(cache)[[1, 0]])


def test_a_cache_that_holds_tokens_but_no_gate_is_an_error() -> None:
    model = tiny_llama()
    cache = filled(model, prompts(1, 5))
    mixture = routed(model)
    with pytest.raises(UserError, match="no gate"):
        model(input_ids=prompts(1, 1), past_key_values=cache)
    with torch.no_grad():  # a given gate is enough
        model(input_ids=prompts(1, 1), past_key_values=cache, task_gate=mixture.one_hot(0, 1))
    assert torch.equal(gate_in(cache), mixture.one_hot(0, 1))


def test_an_emptied_cache_routes_again() -> None:
    model = tiny_llama()
    mixture = routed(model)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=16)):
        with torch.no_grad():
            model(input_ids=prompts(1, 5, seed=1), past_key_values=cache)
            cache.reset()
            assert cache_state_of(cache) is None
            model(input_ids=prompts(1, 5, seed=2), past_key_values=cache)
        torch.testing.assert_close(gate_in(cache), gate_of(mixture, input_ids=prompts(1, 5, seed=2)))


def test_an_unknown_kind_of_cache_is_an_error() -> None:
    model = tiny_llama()
    routed(model)
    with pytest.raises(UserError, match="no gate"):
        model(input_ids=prompts(1, 1), past_key_values=((torch.zeros(1), torch.zeros(1)),))


def test_attaching_twice_replaces_the_cache_state() -> None:
    cache = DynamicCache()
    set_cache_state(cache, CacheState(torch.zeros(1, 2), {}))
    set_cache_state(cache, CacheState(torch.ones(1, 2), {}))
    assert torch.equal(gate_in(cache), torch.ones(1, 2))
    assert type(cache).__mro__.count(DynamicCache) == 1


# -- encoder-decoder --------------------------------------------------------------------------------------------------


def test_encoder_outputs_carry_the_gate_to_the_decoder() -> None:
    model = tiny_t5()
    routed(model)
    ids, start = prompts(2, 7), torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        whole = model(input_ids=ids, decoder_input_ids=start).logits
        encoded = model.get_encoder()(input_ids=ids)
        apart = model(encoder_outputs=encoded, decoder_input_ids=start).logits
    assert torch.equal(whole, apart)
    assert encoded["task_gate"].shape == (2, 3)


def test_encoder_outputs_without_a_gate_are_an_error_unless_the_cache_has_it() -> None:
    model = tiny_t5()
    routed(model)
    ids, start = prompts(2, 7), torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=start, use_cache=True)
        bare = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        with pytest.raises(UserError, match="encoder_outputs carry no gate"):
            model(encoder_outputs=bare, decoder_input_ids=start)
        model(encoder_outputs=bare, decoder_input_ids=start, past_key_values=out.past_key_values)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_encoder_decoder_generate_is_the_same_with_and_without_cache(options: dict[str, Any]) -> None:
    model = tiny_t5()
    routed(model)
    inputs = {"input_ids": prompts(2, 7), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    torch.manual_seed(5)
    cached = generate(model, **inputs, **options)
    torch.manual_seed(5)
    assert torch.equal(cached, generate(model, **inputs, use_cache=False, **options))


@pytest.mark.parametrize("layers", ["above_router", "all"])
def test_encoder_padding_does_not_matter(layers: str) -> None:
    model = tiny_t5()
    mixture = routed(model, layers=layers)
    ids = prompts(1, 5)
    wide = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    start = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        alone = model(input_ids=ids, decoder_input_ids=start).logits
        filled_up = model(input_ids=wide, attention_mask=mask, decoder_input_ids=start).logits
    torch.testing.assert_close(alone, filled_up, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        mixture.routing_features(input_ids=ids),
        mixture.routing_features(input_ids=wide, attention_mask=mask, full_forward=True),
        atol=1e-5,
        rtol=1e-5,
    )


# -- the literal router's selectors -----------------------------------------------------------------------------------


def selecting(model: PreTrainedModel, granularity: str) -> Mixture:
    targets = targets_of(model)
    adapters = random_adapters(targets, RANKS, recipes=False)
    generator = torch.Generator().manual_seed(3)
    for target in targets:
        adapters[-1].selector[f"{target.path}.weight"] = torch.randn(3, target.out_features, generator=generator)
        adapters[-1].selector[f"{target.path}.bias"] = torch.randn(4, generator=generator)
    literal = LiteralSettings(granularity=granularity)  # type: ignore[arg-type]
    return inject(model, targets, adapters, layers=Selectors(settings=literal))


@pytest.mark.parametrize("granularity", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("beams", [1, 3])
def test_selectors_generate_the_same_with_and_without_cache(granularity: str, kind: str, beams: int) -> None:
    model = tiny_llama() if kind == "decoder" else tiny_t5()
    selecting(model, granularity)
    inputs = padded() if kind == "decoder" else {"input_ids": prompts(3, 6)}
    cached = generate(model, **inputs, num_beams=beams)
    assert torch.equal(cached, generate(model, **inputs, num_beams=beams, use_cache=False))
