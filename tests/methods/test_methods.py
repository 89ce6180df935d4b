"""What every method promises, and what each promises of its own. Whole runs with MLflow are marked integration."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from amlora_dist.adapters.settings import AdapterSettings, RouterSettings
from amlora_dist.config.loading import load_config
from amlora_dist.errors import UserError
from amlora_dist.methods import METHODS, asked_of, excluded, method_class, method_for
from amlora_dist.methods.base import Method, adapter_reads
from amlora_dist.methods.kinds import Stages, Trains
from amlora_dist.methods.o_lora import directions, overlap
from amlora_dist.methods.settings import MethodSettings
from amlora_dist.tasks.prompt_format import PromptFormat
from amlora_dist.training.settings import StageSettings, TrainingSettings
from tests.methods.stages import stages
from tests.tiny_config import write_config

DECLARED: dict[str, dict[str, set[str]]] = {
    "am_lora": {"later": {"memory_rows"}},
    "seq_lora": {},
    "inc_lora": {},
    "o_lora": {"later": {"ortho_weight"}},
    "replay": {"later": {"replay_rows"}},
    "ewc": {"first": {"ewc_rows"}, "later": {"ewc_rows", "ewc_weight"}},
    "lwf": {"later": {"lwf_weight", "lwf_temperature"}},
    "l2p": {"first": {"prompt_pool", "prompt_tokens"}, "later": {"prompt_pool", "prompt_tokens"}},
    "keys": {},
    "gainlora": {"later": {"gain_energy"}},
    "ella": {"later": {"ella_weight"}},
    "slao": {},
    "per_task": {},
    "joint": {},
    "base": {},
}
"""One row for each method: the keys of ``method_settings`` that decide its first stage, and its later ones."""

UNDECLARED = ["router.gate.threshold=0.5", "evaluation.batch_size=3", "training.checkpoint_every=3", "name=other"]
FREE_OF_RECIPES = ["training.l1=0.7", "training.recipe_learning_rate=0.01", "training.probe_rows=3"]
"""What only methods that learn recipes read."""


def settings_for(method: str, **values: Any) -> StageSettings:
    return StageSettings(
        method=method, seed=0, dtype="fp32", attention="eager", adapters=AdapterSettings(), router=RouterSettings(),
        training=TrainingSettings(), method_settings=MethodSettings(**values),
    )  # fmt: skip


def other_value(key: str) -> int:
    return int(getattr(MethodSettings(), key)) + 1


def test_every_method_has_its_row_here() -> None:
    assert list(DECLARED) == list(METHODS)


def test_a_method_has_at_most_fifteen_knobs() -> None:
    """Flags, hooks and attributes; ``loss`` is the only one that most methods need."""
    public = {*vars(Method), *Method.__annotations__, *vars(Method(settings_for("am_lora")))}
    knobs = sorted(name for name in public if not name.startswith("_"))
    assert len(knobs) <= 15, knobs


@pytest.mark.parametrize("name", METHODS)
def test_what_is_said_of_a_methods_scores_is_how_it_is_scored(name: str) -> None:
    kind = method_class(name)
    told, nothing = kind.stages is Stages.APART, kind.trains is Trains.NOTHING
    assert asked_of(name) == ("told the task" if told else "own prompt" if nothing else "plain text")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_exactly_the_settings_it_reads(name: str) -> None:
    for stage, when in ((1, "first"), (2, "later")):
        plain = method_for(settings_for(name)).reads(stage)
        for field in fields(MethodSettings):
            changed = method_for(settings_for(name, **{field.name: other_value(field.name)})).reads(stage)
            declared = field.name in DECLARED[name].get(when, set())
            assert (changed != plain) == declared, (field.name, stage)
    assert name == "am_lora" or "recipe" not in method_for(settings_for(name)).reads(2)


# -- what a method gives, stage by stage ------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in METHODS if name != "base"])
def test_what_a_method_does_not_declare_changes_neither_fingerprint_nor_adapter(name: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    used = set().union(*DECLARED[name].values())
    free = [f"method_settings.{f.name}={other_value(f.name)}" for f in fields(MethodSettings) if f.name not in used]
    free += [] if name == "am_lora" else FREE_OF_RECIPES
    short = [f"method={name}", "training.epochs=1"]
    plain = stages(load_config(file, short), tmp_path / "plain", score=False)
    other = stages(load_config(file, [*short, *UNDECLARED, *free]), tmp_path / "other", score=False)
    assert [s.work.fingerprint for s in other] == [s.work.fingerprint for s in plain]
    assert [s.result.adapter.digest() for s in other] == [s.result.adapter.digest() for s in plain]
    for one, again in zip(plain, other, strict=True):
        assert one.result.method_state.keys() == again.result.method_state.keys()
        first, second = one.result.method_state, again.result.method_state
        assert all(torch.equal(first[key], second[key]) for key in first)


FEATURES_TRAIN = ["l2p", "gainlora"]
"""Methods that weigh what they train by the router's features."""


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in METHODS if method_class(name).trains is Trains.ADAPTER])
def test_what_an_adapters_fingerprint_leaves_out_changes_no_adapter(name: str, tmp_path: Path) -> None:
    file, short = write_config(tmp_path, tasks=("colours", "shapes")), [f"method={name}", "training.epochs=1"]
    settings = load_config(file, short).stage_settings()
    if name in FEATURES_TRAIN:
        assert adapter_reads(method_for(settings), 2) is None
        return
    other = [*short, "router.depths=[0]", "router.skip_tokens=0"]
    declared = [adapter_reads(method_for(one), 2) for one in (settings, load_config(file, other).stage_settings())]
    assert declared[0] == declared[1] and declared[0] is not None
    plain = stages(load_config(file, short), tmp_path / "plain", score=False)
    changed = stages(load_config(file, other), tmp_path / "other", score=False)
    for one, again in zip(plain, changed, strict=True):
        assert one.work.fingerprint != again.work.fingerprint
        assert one.result.adapter.digest() == again.result.adapter.digest()
        first, second = one.result.method_state, again.result.method_state
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_an_adapter_has_no_fingerprint_of_its_own_where_its_selectors_read_features_or_prompts_are_of_old() -> None:
    plain, gain = (replace(settings_for(name), prompt_format=PromptFormat(2)) for name in ("am_lora", "gainlora"))
    assert adapter_reads(method_for(plain), 1) is not None and adapter_reads(method_for(plain), 2) is not None
    literal = replace(plain, router=RouterSettings(kind="literal"))
    assert adapter_reads(method_for(literal), 1) is None and adapter_reads(method_for(literal), 2) is None
    assert adapter_reads(method_for(gain), 1) is not None, "one adapter alone has the gate 1"
    assert adapter_reads(method_for(replace(plain, prompt_format=PromptFormat(1))), 1) is None


@pytest.fixture(scope="module")
def old_losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float]]:
    """Loss on the first of two tasks when it was learned and after the second, by method: a case that forgets."""
    folder = tmp_path_factory.mktemp("forgetting")
    file = write_config(folder, tasks=("colours", "shapes"))
    found = {}
    for name, more in {
        "seq_lora": [],
        "replay": ["method_settings.replay_rows=16"],
        "ewc": ["method_settings.ewc_rows=24"],
        "lwf": ["method_settings.lwf_weight=3"],
    }.items():
        first, second = stages(load_config(file, [f"method={name}", *more]), folder / name)
        found[name] = (first.loss("colours"), second.loss("colours"))
    return found


@pytest.mark.integration
@pytest.mark.parametrize("name", ["replay", "ewc", "lwf"])
def test_what_is_meant_to_forget_less_than_sequential_training_does(
    name: str, old_losses: dict[str, tuple[float, float]]
) -> None:
    first, later = old_losses["seq_lora"]
    own_first, own_later = old_losses[name]
    assert own_first == pytest.approx(first), "the first stage is the same"
    assert later > first + 0.5, "sequential training forgets here"
    assert own_later - own_first < 0.8 * (later - first)


@pytest.mark.integration
def test_the_penalty_of_o_lora_lowers_the_overlap_of_directions(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    found = {}
    for weight in (0.0, 20.0):
        config = load_config(file, ["method=o_lora", f"method_settings.ortho_weight={weight}"])
        first, second = stages(config, tmp_path / str(weight), score=False)
        a = second.result.adapter.a
        parts = [
            overlap(torch.stack([a[path] for path in paths]), old) for paths, old in directions([first.result.adapter])
        ]
        found[weight] = float(torch.stack(parts).sum()) / len(a)
    assert found[20.0] < 0.3 * found[0.0]


def test_the_overlap_is_the_mean_squared_cosine_written_out() -> None:
    generator = torch.Generator().manual_seed(1)
    new, old = torch.randn(2, 3, 7, generator=generator), torch.randn(2, 5, 7, generator=generator)
    expected = 0.0
    for module in range(2):
        for row in new[module]:
            expected += sum(float(F.cosine_similarity(row, other, dim=0)) ** 2 for other in old[module]) / 3
    assert float(overlap(new, F.normalize(old, dim=2))) == pytest.approx(expected, abs=1e-6)
    basis = torch.eye(7)[None, :4]
    assert float(overlap(basis[:, :2] * 5, basis)) == pytest.approx(1.0), "inside the span: all of it"
    assert float(overlap(torch.eye(7)[None, 5:], basis)) == 0.0


def test_sequential_methods_train_one_adapter_on_and_incremental_ones_add_a_fresh_one(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    barely = ["training.learning_rate=1e-9", "training.epochs=1"]
    for name, starts_as_copy in (("seq_lora", True), ("inc_lora", False)):
        both = stages(load_config(file, [f"method={name}", *barely]), tmp_path / name, score=False)
        first, second = (stage.result.adapter for stage in both)
        close = all(torch.allclose(first.a[m], second.a[m], atol=1e-4) for m in first.a)
        assert close == starts_as_copy
        recipe = [weights.tolist() for weights in second.recipe.values()]
        assert recipe == ([] if starts_as_copy else [[1.0]] * len(second.a))


def test_the_fisher_information_grows_by_each_task_and_is_no_part_of_the_adapter(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    first, second = stages(load_config(file, ["method=ewc", "training.epochs=1"]), tmp_path / "ewc", score=False)
    assert {name.removeprefix("fisher.") for name in first.result.method_state} == set(first.result.adapter.tensors())
    for name, fisher in first.result.method_state.items():
        assert fisher.shape == first.result.adapter.tensors()[name.removeprefix("fisher.")].shape
        assert bool((fisher >= 0).all()) and bool((second.result.method_state[name] >= fisher).all())
    assert sum(float(f.sum()) for f in first.result.method_state.values()) > 0


def test_ewc_refuses_a_bank_without_fisher_information(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    sequential, _ = stages(load_config(file, ["method=seq_lora", "training.epochs=1"]), tmp_path / "seq", score=False)
    parent = method_for(settings_for("ewc"))
    with pytest.raises(UserError, match="without Fisher information"):
        parent.prepare(_StubMixture(["a.m"]), [sequential.result])  # type: ignore[arg-type]


class _StubMixture:
    """Parameters by name."""

    def __init__(self, names: list[str]) -> None:
        self.device = torch.device("cpu")
        self._names = names

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(torch.zeros(2)) for name in self._names}


def test_replayed_rows_are_named_in_the_fingerprint(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    config = ["method=replay", "training.epochs=1"]
    before = stages(load_config(file, config), tmp_path / "before", score=False)
    seen = before[1].work.rows
    assert seen == {"shapes": None, "colours": 16}
    steps = [len(stage.result.training["losses"]) for stage in before]
    assert steps == [4, 7], "24 rows that are not held out, then as many and 16 old ones, in batches of 6"
    fewer = stages(load_config(file, [*config, "method_settings.replay_rows=3"]), tmp_path / "fewer", score=False)
    assert fewer[0].work.fingerprint == before[0].work.fingerprint
    assert fewer[1].work.fingerprint != before[1].work.fingerprint
    assert len(fewer[1].result.training["losses"]) == 5


def test_joint_training_sees_the_rows_of_all_tasks_in_one_stage(tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours", "shapes"))
    (only,) = stages(load_config(file, ["method=joint", "training.epochs=2"]), tmp_path / "joint")
    assert only.work.rows == {"colours": None, "shapes": None}
    assert len(only.result.training["losses"]) == 2 * 48 / 6, "64 rows, a quarter of them held out"
    assert only.result.statistics.count + only.result.statistics.holdout_count == 48


def test_joint_training_is_the_same_in_every_order_of_the_tasks(tmp_path: Path) -> None:
    found = []
    for tasks in (("colours", "shapes"), ("shapes", "colours")):
        (folder := tmp_path / tasks[0]).mkdir()
        config = load_config(write_config(folder, tasks=tasks), ["method=joint", "training.epochs=1"])
        found += stages(config, folder / "joint", score=False)
    one, other = found
    assert one.work.fingerprint == other.work.fingerprint, "the second is not trained at all where both have one journal"
    assert one.result.training["losses"] == other.result.training["losses"]
    assert one.result.adapter.digest() == other.result.adapter.digest()


def test_distillation_is_zero_where_nothing_changed_and_the_scaled_divergence_elsewhere() -> None:
    method = method_for(settings_for("lwf", lwf_weight=0.5, lwf_temperature=2.0))
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(4, 6, generator=generator), torch.randn(4, 6, generator=generator)
    assert float(method.distillation(old, old)) == pytest.approx(0.0, abs=1e-6)
    p, q = (old / 2).softmax(-1), (new / 2).softmax(-1)
    assert float(method.distillation(new, old)) == pytest.approx(float(0.5 * 4 * (p * (p / q).log()).sum()), rel=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if "zero_3" in excluded(name)])
def test_what_zero_3_cannot_do_for_a_method_is_refused_before_anything_starts(name: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, tasks=("colours",), method=name)
    with pytest.raises(UserError, match=f"zero_stage: found 3 with method: {name}, which reads the parameters"):
        load_config(file, ["workers=2", "deepspeed.zero_stage=3"])
    load_config(file, ["workers=2", "deepspeed.zero_stage=2"])
    load_config(file, ["workers=0", "deepspeed.zero_stage=3"])


# -- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny tasks, and the home that all methods' runs share, as in a comparison."""
    return tmp_path_factory.mktemp("methods")


@pytest.mark.integration
@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_a_sequence_and_a_second_start_trains_nothing(
    name: str, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.runs.progress import Silent
    from pipelines.runs.sequence import run_sequence

    monkeypatch.setenv("AMLORA_HOME", str(shared / "home"))
    file = write_config(shared, tasks=("colours", "shapes"))

    def run() -> dict[str, Any]:
        more = ["training.learning_rate=0.3"] if name == "l2p" else []  # prompts alone hardly move a random base
        return run_sequence(load_config(file, [f"method={name}", *more]), run_id=name, progress=Silent())

    first = run()
    check_shape(name, first)
    if name == "ewc":
        shutil.rmtree(shared / "home" / "storage")  # its Fisher information comes back from the registry
    again = run()
    assert all(stage["reused"] for stage in again["stages"])
    for key in ("accuracy_matrix", "ranked_accuracy_matrix", "oracle", "untrained", "metrics"):
        assert again[key] == first[key]


def check_shape(name: str, result: dict[str, Any]) -> None:
    """Every cell is scored as the method would serve it; what it has no answer for is null."""
    matrix, metrics = result["accuracy_matrix"], result["metrics"]
    assert all(value is not None for value in result["untrained"])
    if name in ("joint", "base"):
        assert len(matrix) == 1 and None not in matrix[0]
        assert metrics["average_performance"] == pytest.approx(sum(matrix[0]) / 2)
        assert metrics["forgetting"] is None and metrics["backward_transfer"] is None
        assert result["oracle"] is None
    else:
        assert len(matrix) == 2 and None not in matrix[1]
        assert (matrix[0][1] is None) == (name == "per_task")
    if name == "base":
        assert matrix[0] == result["untrained"]
        assert [stage["version"] for stage in result["stages"]] == [None]
    else:
        assert matrix[0][0] > result["untrained"][0], "it learns"
    if name == "per_task":
        assert matrix[1][0] == matrix[0][0] and metrics["forgetting"] == 0.0
        assert result["oracle"] is None


@pytest.mark.integration
def test_ewc_goes_on_from_the_registry_alone(tmp_path: Path, amlora_home: Path) -> None:
    from pipelines.runs.progress import Silent
    from pipelines.runs.sequence import run_sequence

    file = write_config(tmp_path, tasks=("colours",), method="ewc")
    run_sequence(load_config(file), run_id="first", progress=Silent())
    shutil.rmtree(amlora_home / "storage")
    more = write_config(tmp_path, tasks=("shapes",), method="ewc", parent="models:/first@current")
    further = run_sequence(load_config(more), run_id="further", progress=Silent())
    whole_run = write_config(tmp_path, tasks=("colours", "shapes"), method="ewc")
    both = run_sequence(load_config(whole_run), run_id="both", progress=Silent())
    assert both["stages"][1]["fingerprint"] == further["stages"][0]["fingerprint"]
    assert [stage["reused"] for stage in both["stages"]] == [True, True]


@pytest.mark.integration
def test_replay_says_that_the_rows_of_a_parent_bank_are_not_there(tmp_path: Path) -> None:
    from pipelines.runs.progress import Silent
    from pipelines.runs.sequence import run_sequence

    file = write_config(tmp_path, tasks=("colours",), method="replay")
    run_sequence(load_config(file), run_id="first", progress=Silent())
    more = write_config(tmp_path, tasks=("shapes",), method="replay", parent="models:/first@current")
    with pytest.raises(UserError, match="trains on rows of colours too"):
        run_sequence(load_config(more), run_id="further", progress=Silent())
