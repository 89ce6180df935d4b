"""Keys for labels: Bayes' rule on Gaussians in closed form, additive over tasks and ranks, calibrated on held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from amlora_dist.adapters import keyed_router as module
from amlora_dist.adapters.keyed_router import KeyedRouter, keyed_router, keyed_router_from
from amlora_dist.adapters.keys import (
    FEWEST_ROWS,
    PRIOR_BETA,
    PRIOR_TEMPERATURE,
    Fitted,
    depth_choices,
    fit,
    fit_betas,
    make_keys,
)
from amlora_dist.adapters.router import posterior_router
from amlora_dist.adapters.settings import GateSettings, LabelKeys
from amlora_dist.adapters.statistics import HeldOut, TaskStatistics, merge
from amlora_dist.errors import BankError

WIDTH = 6


def rows_of(task: int, label: int, count: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * task + 10 * label + seed)
    centre = torch.zeros(WIDTH)
    centre[task] = 3.0
    centre[3 + label] = 2.0
    return centre + torch.randn(count, WIDTH, generator=draw)


def statistics_of(task: int, labels: int, count: int = 40, held: int = 0) -> TaskStatistics:
    features = torch.cat([rows_of(task, label, count) for label in range(labels)])
    places = [label for label in range(labels) for _ in range(count)]
    made = TaskStatistics.from_features(f"task{task}", features, places, labels)
    if not held:
        return made
    unseen = torch.cat([rows_of(task, label, held, seed=7) for label in range(labels)])
    truth = torch.tensor([label for label in range(labels) for _ in range(held)])
    return replace(made, held=HeldOut(unseen, truth))


BANK = [statistics_of(0, 3, held=20), statistics_of(1, 2, held=20), statistics_of(2, 2, held=20)]


def test_a_key_a_task_is_the_router_of_before() -> None:
    plain = [TaskStatistics(s.task, s.count, s.mean, s.task_factor) for s in BANK]
    before = posterior_router(plain, shrinkage=0.0, gate=GateSettings(temperature=1.0))
    keys = make_keys(BANK, "task", 0.0)
    rows = torch.cat([rows_of(task, 0, 5, seed=3) for task in range(3)])
    torch.testing.assert_close(keys.of_tasks(keys.scores(rows, 1.0)), before.posterior(rows))


def test_the_posterior_of_a_label_is_bayes_rule_on_gaussians_of_one_covariance() -> None:
    keys = make_keys(BANK, "label", 0.2)
    scatter = sum((s.factor.T @ s.factor for s in BANK), torch.zeros(WIDTH, WIDTH, dtype=torch.float64))
    sigma = scatter / sum(s.count for s in BANK)
    sigma = 0.8 * sigma + 0.2 * sigma.diag().diag()
    rows = rows_of(1, 1, 4, seed=5).double()
    logs = []
    for one in BANK:
        assert one.by_label is not None
        for mean in one.by_label.means:
            density = torch.distributions.MultivariateNormal(mean, sigma).log_prob(rows)
            logs.append(density - torch.tensor(3.0 * len(one.by_label.means)).log())
    wanted = torch.softmax(torch.stack(logs, dim=1), dim=1)
    found = torch.softmax(keys.scores(rows, 1.0) + keys.log_prior, dim=1)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(keys.of_tasks(keys.scores(rows, 1.0))[:, 1], wanted[:, 3:5].sum(dim=1))


def test_the_shares_of_two_ranks_are_the_statistics_of_all_rows() -> None:
    features = torch.cat([rows_of(0, label, 9) for label in range(3)])
    labels = [label for label in range(3) for _ in range(9)]
    whole = TaskStatistics.from_features("t", features, labels, 3)
    parts = [TaskStatistics.from_features("t", features[at::2], labels[at::2], 3) for at in range(2)]
    joined = merge(parts)
    assert joined.by_label is not None and whole.by_label is not None
    torch.testing.assert_close(joined.by_label.means, whole.by_label.means)
    torch.testing.assert_close(joined.factor.T @ joined.factor, whole.factor.T @ whole.factor)
    torch.testing.assert_close(joined.task_factor.T @ joined.task_factor, whole.task_factor.T @ whole.task_factor)


def test_statistics_with_the_held_out_rows_are_those_of_all_rows() -> None:
    features = torch.cat([rows_of(0, label, 20) for label in range(2)])
    places = [label for label in range(2) for _ in range(20)]
    unseen = torch.arange(0, 40, 5)
    kept = [place for place in range(40) if place not in set(unseen.tolist())]
    part = TaskStatistics.from_features("t", features[kept], [places[n] for n in kept], 2)
    part = replace(part, held=HeldOut(features[unseen], torch.tensor(places)[unseen]))
    whole, wanted = part.with_held(), TaskStatistics.from_features("t", features, places, 2)
    assert whole.count == 40 and whole.held is part.held and whole.by_label is not None and wanted.by_label is not None
    torch.testing.assert_close(whole.mean, wanted.mean)
    torch.testing.assert_close(whole.by_label.means, wanted.by_label.means)
    torch.testing.assert_close(whole.factor.T @ whole.factor, wanted.factor.T @ wanted.factor)


def test_keys_that_serve_have_seen_the_rows_that_their_settings_were_chosen_on() -> None:
    found = fit(BANK, "label", (0.1, 0.5))
    torch.testing.assert_close(found.unseen.weights, make_keys(BANK, "label", found.shrinkage).weights)
    whole = make_keys([one.with_held() for one in BANK], "label", found.shrinkage)
    torch.testing.assert_close(found.keys.weights, whole.weights)
    assert not torch.allclose(found.keys.weights, found.unseen.weights)


def test_statistics_come_back_from_their_tensors_with_labels_and_held_out_rows() -> None:
    one = replace(BANK[0], background={"news": torch.ones(WIDTH, dtype=torch.float64)})
    back = TaskStatistics.from_tensors(one.task, one.tensors())
    assert back.by_label is not None and one.by_label is not None and back.held is not None and one.held is not None
    assert torch.equal(back.by_label.means, one.by_label.means) and torch.equal(back.held.features, one.held.features)
    assert torch.equal(back.background["news"], one.background["news"])


def test_chosen_tasks_are_weighed_as_if_there_were_no_others() -> None:
    router = keyed_router(BANK, rule="label", shrinkage=0.1, gate=GateSettings())
    rows = rows_of(1, 0, 6, seed=2)
    few = router.only([0, 2]).gates(rows, 6)
    assert bool((few[:, 1] == 0).all())
    torch.testing.assert_close(few.sum(dim=1), torch.ones(6))


def test_a_label_without_rows_takes_the_least_of_the_others() -> None:
    features = torch.cat([rows_of(0, 0, 20), rows_of(0, 1, 20)])
    odd = TaskStatistics.from_features("odd", features, [0] * 20 + [1] * 20, 3)
    router = keyed_router([odd, BANK[1]], rule="label", shrinkage=0.1, gate=GateSettings())
    found = router.of_labels(router.evidence(rows_of(0, 0, 4, seed=9)).labels_BJ, 0)
    assert found is not None and found.shape == (4, 3)
    torch.testing.assert_close(found[:, 2], found[:, :2].amin(dim=1))


def test_few_held_out_rows_fit_no_weight_of_the_evidence() -> None:
    few = [statistics_of(0, 2, held=10)]
    keys = make_keys(few, "label", 0.1)
    assert fit_betas(few, keys, PRIOR_TEMPERATURE)[0] == PRIOR_BETA
    assert fit_betas(few, keys, 4 * PRIOR_TEMPERATURE)[0] == 4 * PRIOR_BETA, "flatter keys weigh more"


def test_the_weight_of_the_evidence_is_what_held_out_rows_prefer() -> None:
    """Keys are all there is next to a model that knows nothing, and nothing next to one that knows while they mislead."""
    bare = [statistics_of(task, 2, held=FEWEST_ROWS // 2) for task in range(2)]
    keys = make_keys(bare, "label", 0.1)
    ignorant, knowing = [], []
    for one in bare:
        assert one.held is not None
        ignorant.append(replace(one, held=replace(one.held, loglikelihoods=torch.zeros(len(one.held.labels), 2))))
        wrong = 1 - one.held.labels
        known_logits = 50.0 * torch.nn.functional.one_hot(wrong, 2).float()
        knowing.append(replace(one, held=HeldOut(one.held.features, wrong, known_logits)))
    assert fit_betas(ignorant, keys, 1.0)[0] > 0 and fit_betas(knowing, keys, 1.0)[0] == 0.0


def test_a_router_comes_back_as_it_was_stored() -> None:
    background = {"a": torch.full((WIDTH,), -4.0), "b": torch.full((WIDTH,), 9.0)}
    router = keyed_router(BANK, rule="label", shrinkage=None, gate=GateSettings(abstention=True), background=background)
    back = keyed_router_from(router.tensors(), router.settings())
    rows = torch.cat([rows_of(0, 0, 3), torch.full((2, WIDTH), -4.0)])
    assert torch.equal(back.gates(rows, 5), router.gates(rows, 5))
    assert (back.beta, back.temperature, back.parts, back.threshold) == (
        router.beta, router.temperature, router.parts, router.threshold,
    )  # fmt: skip


def test_foreign_texts_get_no_gate_and_own_rows_are_lost_as_often_as_was_asked() -> None:
    background = {"far": torch.full((WIDTH,), -4.0)}
    gate = GateSettings(abstention=True, lost=0.05)
    router = keyed_router(BANK, rule="label", shrinkage=0.1, gate=gate, background=background)
    assert isinstance(router, KeyedRouter) and router.parts == ("far",)
    far = torch.full((30, WIDTH), -4.0) + 0.3 * torch.randn(30, WIDTH, generator=torch.Generator().manual_seed(1))
    assert bool((router.gates(far, 30) == 0).all())
    held = torch.cat([one.held.features for one in BANK if one.held is not None])
    lost = (router.gates(held, len(held)).sum(dim=1) == 0).float().mean()
    assert float(lost) <= 0.05 + 1 / len(held)


def test_a_part_of_the_background_that_takes_own_rows_is_left_out() -> None:
    background = {"far": torch.full((WIDTH,), -4.0), "near": BANK[0].mean.float()}
    router = keyed_router(BANK, rule="label", shrinkage=0.1, gate=GateSettings(), background=background)
    assert router.parts == ("far",)


def test_keys_for_labels_and_for_tasks_are_weighed_as_a_geometric_mean() -> None:
    router = keyed_router(BANK, rule="label", shrinkage=0.1, gate=GateSettings())
    rows = torch.cat([rows_of(task, 1, 6, seed=9) for task in range(3)])
    assert router.whole is not None
    by_label = router.keys.of_tasks(router.keys.scores(rows, router.temperature))
    by_task = router.whole.of_tasks(router.whole.scores(rows, router.whole_temperature))
    wanted = (by_label * by_task).sqrt()
    torch.testing.assert_close(router.posterior(rows), wanted / wanted.sum(dim=1, keepdim=True))
    torch.testing.assert_close(router.evidence(rows).posterior_BT, router.posterior(rows))
    again = keyed_router_from(router.tensors(), router.settings())
    torch.testing.assert_close(again.posterior(rows), router.posterior(rows))
    only = router.only([0, 2]).posterior(rows)
    assert float(only[:, 1].max()) == 0.0 and torch.allclose(only.sum(dim=1), torch.ones(18, dtype=torch.float64))


def test_a_router_that_was_stored_without_keys_for_tasks_answers_by_those_for_labels() -> None:
    router = keyed_router(BANK, rule="label", shrinkage=0.1, gate=GateSettings())
    tensors = {name: tensor for name, tensor in router.tensors().items() if not name.startswith("whole.")}
    settings = {key: value for key, value in router.settings().items() if not key.startswith("whole")}
    old = keyed_router_from(tensors, settings)
    rows = rows_of(1, 0, 4, seed=11)
    torch.testing.assert_close(old.posterior(rows), router.keys.of_tasks(router.keys.scores(rows, router.temperature)))


def test_depths_that_only_disturb_are_left_out_where_held_out_rows_say_so() -> None:
    assert [len(one) for one in depth_choices(8, 2)] == [8], "too few depths to choose from"
    every, second = depth_choices(4 * WIDTH, 4)
    assert second.tolist() == [*range(WIDTH, 2 * WIDTH), *range(3 * WIDTH, 4 * WIDTH)] and len(every) == 4 * WIDTH

    def deep(one: TaskStatistics, disturbed: tuple[int, ...]) -> TaskStatistics:
        """The rows at four depths, some of which say nothing but are wide."""
        draw = torch.Generator().manual_seed(len(one.task))

        def at_four(rows: Tensor) -> Tensor:
            noise = 30 * torch.randn(len(rows), 4, WIDTH, generator=draw)
            return torch.stack([noise[:, k] if k in disturbed else rows for k in range(4)], dim=1).flatten(1)

        labels = len(one.by_label.counts) if one.by_label is not None else 0
        places = [label for label in range(labels) for _ in range(8)]
        rows = torch.cat([rows_of(int(one.task[-1]), label, 8) for label in range(labels)])
        made = TaskStatistics.from_features(one.task, at_four(rows), places, labels)
        assert one.held is not None
        return replace(made, held=HeldOut(at_four(one.held.features), one.held.labels))

    choices = depth_choices(4 * WIDTH, 4)
    chosen = fit([deep(one, (0, 2)) for one in BANK], "label", (0.1, 0.5), choices)
    assert chosen.columns.tolist() == second.tolist()
    left_out = [place for place in range(4 * WIDTH) if place not in second.tolist()]
    assert bool((chosen.keys.weights[:, left_out] == 0).all()) and bool((chosen.keys.weights[:, second] != 0).any())


def test_a_task_whose_model_knows_less_leans_more_on_the_keys() -> None:
    bare = [statistics_of(task, 2, held=20) for task in range(3)]
    keys = make_keys(bare, "label", 0.1)

    def with_model(one: TaskStatistics, *, knows: bool) -> TaskStatistics:
        held = one.held
        assert held is not None
        labels = 1 - held.labels if knows else held.labels  # where the model knows, the keys mislead
        known_logits = 3.0 * torch.nn.functional.one_hot(labels, 2).float() if knows else torch.zeros(len(labels), 2)
        return replace(one, held=HeldOut(held.features, labels, known_logits))

    mixed = [with_model(one, knows=place != 1) for place, one in enumerate(bare)]
    pooled, each = fit_betas(mixed, keys, 1.0)
    assert each[1] > each[0] == each[2] and each[0] <= pooled <= each[1]
    nobody = [replace(one, held=None) for one in mixed]
    assert fit_betas(nobody, keys, PRIOR_TEMPERATURE) == (PRIOR_BETA, (PRIOR_BETA,) * 3)


def test_what_keys_say_of_a_tasks_labels_stays_where_they_are_those_of_its_own_stage() -> None:
    """The keys to the bit, what they say to rounding; routes follow all tasks of the bank either way."""
    known = []
    for one in BANK:
        assert one.held is not None and one.by_label is not None
        logits = torch.randn(len(one.held.labels), len(one.by_label.counts), generator=torch.Generator().manual_seed(5))
        known.append(replace(one, held=replace(one.held, loglikelihoods=logits)))
    rows = torch.cat([rows_of(0, label, 4, seed=13) for label in range(3)])

    def made(stage: int, which: LabelKeys) -> KeyedRouter:
        return keyed_router(known[:stage], rule="label", shrinkage=None, gate=GateSettings(), label_keys=which)

    def said(router: KeyedRouter) -> Tensor:
        found = router.of_labels(router.evidence(rows).labels_BJ, 0)
        assert found is not None
        return router.betas[0] * found

    steady = [made(stage, "stage") for stage in (1, 2, 3)]
    for later in steady[1:]:
        assert later.own is not None and steady[0].own is not None
        assert torch.equal(later.own.weights[:3], steady[0].own.weights) and later.betas[0] == steady[0].betas[0]
        torch.testing.assert_close(said(later), said(steady[0]), rtol=0, atol=1e-9)
    moving = [made(stage, "bank") for stage in (1, 2, 3)]
    assert torch.allclose(said(moving[0]), said(steady[0])) and not torch.allclose(said(moving[0]), said(moving[2]))
    for before, after in zip(moving, steady, strict=True):
        assert torch.equal(before.gates(rows, len(rows)), after.gates(rows, len(rows)))
        last = len(before.tasks) - 1
        new = rows_of(last, 0, 4, seed=14)
        now, then = (one.of_labels(one.evidence(new).labels_BJ, last) for one in (after, before))
        assert now is not None and then is not None and torch.allclose(now, then) and after.betas[last] == before.betas[last]


def test_keys_of_own_stages_come_back_as_they_were_stored_and_a_bank_without_them_stores_what_it_did() -> None:
    router = keyed_router(BANK, rule="label", shrinkage=None, gate=GateSettings(), label_keys="stage")
    back = keyed_router_from(router.tensors(), router.settings())
    rows = rows_of(1, 1, 5, seed=15)
    for one in (back, router.to("cpu"), router.only([1, 2])):
        assert torch.equal(one.evidence(rows).labels_BJ, router.evidence(rows).labels_BJ)
    plain = keyed_router(BANK, rule="label", shrinkage=None, gate=GateSettings())
    assert "own" not in plain.settings() and not any(name.startswith("own.") for name in plain.tensors())
    with pytest.raises(BankError, match="keys of own stages do not fit"):
        replace(router, own=plain.whole)


def test_the_keys_of_each_stage_are_fitted_once_in_a_process_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[int] = []

    def counting(statistics: Sequence[TaskStatistics], *more: Any) -> Fitted:
        fitted.append(len(statistics))
        return fit(statistics, *more)

    monkeypatch.setattr(module, "fit", counting)
    monkeypatch.setattr(module, "_KNOWN", {})
    routers = [
        keyed_router(known, rule="label", shrinkage=None, gate=GateSettings(), label_keys="stage")
        for known in (BANK[:1], BANK[:2], BANK, [BANK[1], BANK[0]])
    ]
    assert fitted == [1, 1, 2, 2, 3, 3, 2, 2, 1], "the bank's, of labels and of tasks; of another order its first stage"
    monkeypatch.setattr(module, "_KNOWN", {})
    again = keyed_router(BANK, rule="label", shrinkage=None, gate=GateSettings(), label_keys="stage")
    assert again.own is not None and routers[2].own is not None and torch.equal(again.own.weights, routers[2].own.weights)
