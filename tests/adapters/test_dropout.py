"""What a new adapter reads is dropped by row, place and layer alone, and nothing else is dropped."""

from __future__ import annotations

import torch

from amlora_dist.adapters.dropout import DropoutKeys, dropped, layer_key, row_keys
from amlora_dist.adapters.inject import NewAdapter, inject
from tests.adapters.banks import prompts, random_adapters, targets_of, tiny_llama

CPU = torch.device("cpu")


def keys(*places: int, step: int = 0, from_right: bool = True) -> DropoutKeys:
    return row_keys(0, "task", step, places, from_right=from_right, device=CPU)


def test_the_share_is_what_was_asked_for_and_the_mean_stays() -> None:
    x = torch.ones(16, 40, 96)
    for share in (0.1, 0.5, 0.9):
        out = dropped(x, keys(*range(16)), layer_key("m"), share)
        assert abs(float((out == 0).double().mean()) - share) < 0.01
        assert abs(float(out.double().mean()) - 1.0) < 0.03
        assert set(out.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1.0 - share))}
    assert torch.equal(dropped(x, keys(*range(16)), layer_key("m"), 0.0), x)


def test_numbers_of_other_rows_steps_places_features_and_layers_have_nothing_to_do_with_each_other() -> None:
    x = torch.ones(1, 64, 64)
    one = dropped(x, keys(0), layer_key("m"), 0.5) == 0
    others = {
        "row": dropped(x, keys(1), layer_key("m"), 0.5) == 0,
        "step": dropped(x, keys(0, step=1), layer_key("m"), 0.5) == 0,
        "layer": dropped(x, keys(0), layer_key("n"), 0.5) == 0,
        "place": one.roll(1, dims=1),
        "feature": one.roll(1, dims=2),
    }
    for name, other in others.items():
        assert abs(float((one == other).double().mean()) - 0.5) < 0.04, name


def test_padding_and_neighbours_do_not_matter() -> None:
    x = torch.randn(3, 9, 32)
    whole = dropped(x, keys(4, 0, 7), layer_key("m"), 0.3)
    assert torch.equal(dropped(x[1:2], keys(0), layer_key("m"), 0.3), whole[1:2])
    padded = torch.cat([torch.zeros(3, 5, 32), x], dim=1)
    assert torch.equal(dropped(padded, keys(4, 0, 7), layer_key("m"), 0.3)[:, 5:], whole), "padded on the left"
    left = dropped(x, keys(4, 0, 7, from_right=False), layer_key("m"), 0.3)
    padded = torch.cat([x, torch.zeros(3, 5, 32)], dim=1)
    assert torch.equal(dropped(padded, keys(4, 0, 7, from_right=False), layer_key("m"), 0.3)[:, :9], left), "on the right"


def test_only_the_new_adapter_reads_less_and_only_where_a_call_says_so() -> None:
    def logits(rate: float, given: bool, b: float) -> torch.Tensor:
        torch.manual_seed(0)
        model = tiny_llama()
        targets = targets_of(model, targets="all-linear")
        old = random_adapters(targets, [2], size=0.2)
        mixture = inject(model, targets, old, new=NewAdapter(task="new", rank=2, alpha=4.0, dropout=rate))
        with torch.no_grad():
            for module in mixture.modules.values():
                module.recipe.fill_(1.0)  # type: ignore[union-attr]
            for name, parameter in mixture.trainable().items():
                if name.startswith("b."):
                    parameter.fill_(b)
        more = {"dropout_keys": keys(0, 1)} if given else {}
        return model(input_ids=prompts(2, 6), task_gate=mixture.one_hot(1, 2), **more).logits

    torch.testing.assert_close(logits(0.5, True, 0.0), logits(0.0, False, 0.0), atol=1e-5, rtol=1e-5)
    plain = logits(0.0, False, 0.1)
    torch.testing.assert_close(logits(0.5, False, 0.1), plain)
    torch.testing.assert_close(logits(0.0, True, 0.1), plain)
    assert float((logits(0.5, True, 0.1) - plain).detach().abs().max()) > 1e-2
