"""What an application holds: loaded from a folder, routing, answering, classifying, by several threads at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from amlora_dist.adapters.adapter import rows
from amlora_dist.adapters.router import FixedRouter
from amlora_dist.adapters.settings import GateSettings, LiteralSettings
from amlora_dist.base_model import ModelSettings, load_model, resolve_base
from amlora_dist.errors import BankError, UserError
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry.bank_folder import read_bank, write_bank
from amlora_dist.registry.manifest import replace
from amlora_dist.tasks.prompts import PromptTemplate
from tests.bank_with_base import TASKS, texts_of, write_working_bank
from tests.tiny_config import TOPICS, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Banks by architecture, with their base models; only read."""
    folder = tmp_path_factory.mktemp("banks")
    for kind in ("llama", "t5"):
        write_working_bank(folder / kind, folder / f"base-{kind}", kind)
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> AMLoRAModel:
    return AMLoRAModel.from_bank(place / "llama", device="cpu")


@pytest.fixture(scope="module")
def t5(place: Path) -> AMLoRAModel:
    return AMLoRAModel.from_bank(place / "t5", device="cpu")


@pytest.fixture(scope="module")
def exact(place: Path) -> tuple[AMLoRAModel, AMLoRAModel]:
    """Both in fp64: whether two ways give the same numbers must not hang on how a processor rounds fp32."""
    llama, t5 = (AMLoRAModel.from_bank(place / kind, device="cpu", dtype=torch.float64) for kind in ("llama", "t5"))
    return llama, t5


TEXTS = [texts_of(task, 3, "test")[i] for i in range(3) for task in TASKS]
BELONGS = list(TASKS) * 3


def test_every_text_is_routed_to_its_task_and_the_weights_add_up(model: AMLoRAModel, t5: AMLoRAModel) -> None:
    for one in (model, t5):
        found = one.route(TEXTS)
        assert [route.task for route in found] == BELONGS
        for route in found:
            assert sum(route.tasks.values()) + route.abstention == pytest.approx(1.0, abs=1e-6)
            assert list(route.tasks) == list(TASKS) == list(route.adapters)
    # a row uses earlier adapters too, by its recipe
    recipe = torch.stack([rows(model.bank.adapters, m)[2] for m in model.bank.adapters[2].a]).mean(dim=0)
    route = model.route([TEXTS[2]])[0]
    if route.tasks["sizes"] == 1.0:
        assert list(route.adapters.values()) == pytest.approx(recipe.tolist(), abs=1e-5)


def test_a_batch_gives_what_each_text_alone_gives(exact: tuple[AMLoRAModel, AMLoRAModel]) -> None:
    for one in exact:
        together = one.answer(TEXTS, batch_size=4)
        alone = [one.answer(text)[0] for text in TEXTS]
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        torch.testing.assert_close(one.next_token_logits(TEXTS), torch.cat([one.next_token_logits([t]) for t in TEXTS]))


def test_answers_are_those_of_transformers_generate(model: AMLoRAModel) -> None:
    for text, answer in zip(TEXTS, model.answer(TEXTS, max_new_tokens=5), strict=True):
        tokens = model.tokenizer(f"{text}\nAnswer:", return_tensors="pt", return_token_type_ids=False)
        made = model.generate(**tokens, max_new_tokens=5, do_sample=False)
        new = made[0, tokens["input_ids"].shape[1] :]
        assert model.tokenizer.decode(new, skip_special_tokens=True).strip() == answer.text


def test_forward_routes_as_route_says(model: AMLoRAModel) -> None:
    tokens = model.tokenizer(f"{TEXTS[0]}\nAnswer:", return_tensors="pt", return_token_type_ids=False)
    gate = torch.tensor([list(model.route(TEXTS[0])[0].tasks.values())])
    with torch.no_grad():
        torch.testing.assert_close(model(**tokens).logits, model.forward(**tokens, task_gate=gate).logits)


def test_without_labels_those_of_the_routed_task_are_ranked(model: AMLoRAModel, t5: AMLoRAModel) -> None:
    for one in (model, t5):
        for found, task in zip(one.classify(TEXTS), BELONGS, strict=True):
            assert found.task == task
            assert found.label in TOPICS[task][0]
            assert list(found.scores) == TOPICS[task][0]
            assert sum(found.scores.values()) == pytest.approx(1.0)
            assert max(found.scores, key=found.scores.__getitem__) == found.label


def test_a_named_task_uses_its_own_row_and_prompt(exact: tuple[AMLoRAModel, AMLoRAModel]) -> None:
    model = exact[0]
    named = model.classify(TEXTS, task="fruit" if "fruit" in model.tasks else "shapes")
    assert {found.task for found in named} == {"shapes"}
    assert all(found.route.tasks == {"colours": 0.0, "shapes": 1.0, "sizes": 0.0} for found in named)
    text, each = TEXTS[:2], model.classify(TEXTS[:2], task=["shapes", None])
    assert each[0] == named[0]
    assert each[1].scores == pytest.approx(model.classify(text)[1].scores, abs=1e-5)
    prompt = f"{TEXTS[0]}\nwhat ?\nAnswer:"
    tokens = model.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits = model(**tokens, task_gate=torch.tensor([[0.0, 1.0, 0.0]])).logits[0, -1].log_softmax(-1)
    ids = [model.tokenizer.convert_tokens_to_ids(label) for label in TOPICS["shapes"][0]]
    assert list(named[0].scores.values()) == pytest.approx(logits[ids].softmax(-1).tolist(), abs=1e-5)


def test_labels_of_the_caller_are_taken_for_all_texts(model: AMLoRAModel) -> None:
    found = model.classify(TEXTS, ["apple", "pear"])
    assert {one.label for one in found} <= {"apple", "pear"}
    assert {one.task for one in found} == {None}
    assert [one.route.task for one in found] == BELONGS
    with pytest.raises(UserError, match="labels: found none"):
        model.classify(TEXTS, [])


def test_use_tasks_routes_over_some_tasks_and_leaves_the_model_as_it_was(model: AMLoRAModel, t5: AMLoRAModel) -> None:
    for one in (model, t5):
        few = one.use_tasks(["sizes", "colours"])
        for route, task in zip(few.route(TEXTS), BELONGS, strict=True):
            assert route.tasks["shapes"] == 0.0
            assert sum(route.tasks.values()) == pytest.approx(1.0)
            assert task == "shapes" or route.task == task
        shapes = few.answer(TEXTS)[1].route
        assert shapes.tasks["shapes"] == 0.0
        assert shapes.tasks == pytest.approx(few.route(TEXTS)[1].tasks, abs=1e-5)
        assert one.route(TEXTS)[1].task == "shapes"
    with pytest.raises(UserError, match="unknown \\['fruit'\\]"):
        model.use_tasks(["fruit"])
    with pytest.raises(UserError, match="found none"):
        model.use_tasks([])


def test_routers_without_a_posterior_keep_the_mass_of_a_row(place: Path, tmp_path: Path) -> None:
    router = FixedRouter(TASKS, (0.5, 0.25, 0.25))
    write_working_bank(tmp_path / "fixed", place / "base-llama", router=router)
    model = AMLoRAModel.from_bank(tmp_path / "fixed", device="cpu")
    assert model.route(TEXTS[0])[0].tasks == {"colours": 0.5, "shapes": 0.25, "sizes": 0.25}
    few = model.use_tasks(["shapes", "sizes"])
    assert few.answer(TEXTS[0])[0].route.tasks == {"colours": 0.0, "shapes": 0.5, "sizes": 0.5}


def test_two_threads_get_what_one_gets(model: AMLoRAModel) -> None:
    few = model.use_tasks(["sizes"])
    expected = {id(one): (one.classify(TEXTS), one.answer(TEXTS)) for one in (model, few)}
    start = threading.Barrier(4)

    def work(one: AMLoRAModel) -> bool:
        start.wait(timeout=60)
        return all((one.classify(TEXTS), one.answer(TEXTS)) == expected[id(one)] for _ in range(4))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, [model, few, model, few])) == [True] * 4


def test_another_base_model_is_refused_by_its_digest(place: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", "llama")
    config = (other / "config.json").read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    assert config != (other / "config.json").read_text()
    (other / "config.json").write_text(config)
    with pytest.raises(UserError, match=r"digest: found [0-9a-f]{12}.*the bank was trained on [0-9a-f]{12}.*base="):
        AMLoRAModel.from_bank(place / "llama", base=other)


def test_a_base_model_that_moved_is_found_where_the_caller_says(place: Path, tmp_path: Path) -> None:
    bank = read_bank(place / "llama")
    away = replace(bank.manifest, base=replace(bank.manifest.base, source="/nowhere/base"))  # type: ignore[type-var]
    write_bank(tmp_path / "away", away, bank.adapters, bank.router, bank.statistics)
    with pytest.raises(UserError, match=r"'/nowhere/base' cannot be had.*--base"):
        AMLoRAModel.from_bank(tmp_path / "away")
    moved = Path(shutil.copytree(place / "base-llama", tmp_path / "moved"))
    model = AMLoRAModel.from_bank(tmp_path / "away", base=moved, device="cpu", dtype="fp32")
    assert model.base_model_path == moved


def test_a_pulled_copy_on_another_path_gives_the_same_logits_bit_for_bit(model: AMLoRAModel, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model.base_model_path.parent / "llama", tmp_path / "elsewhere"))
    again = AMLoRAModel.from_bank(copied, device="cpu")
    assert torch.equal(again.next_token_logits(TEXTS), model.next_token_logits(TEXTS))


def test_a_literal_bank_answers_and_says_how_its_layers_weigh(place: Path, tmp_path: Path) -> None:
    for granularity in ("token", "sequence"):
        folder = tmp_path / granularity
        write_working_bank(folder, place / "base-llama", literal=LiteralSettings(granularity=granularity))
        model = AMLoRAModel.from_bank(folder, device="cpu")
        route = model.route(TEXTS)[0]
        assert 0 < sum(route.tasks.values()) < 1, "softmax gives the zero adapter a share"
        assert model.answer(TEXTS)[0].route.tasks == pytest.approx(route.tasks, abs=1e-5)
        assert model.classify(TEXTS[0])[0].label is not None
        with pytest.raises(UserError, match="router kind literal"):
            model.use_tasks(["shapes"])


def test_an_abstaining_router_leaves_the_label_open(place: Path, tmp_path: Path) -> None:
    router = FixedRouter(TASKS, (0.0, 0.0, 0.0))
    write_working_bank(tmp_path / "none", place / "base-llama", router=router)
    found = AMLoRAModel.from_bank(tmp_path / "none", device="cpu").classify(TEXTS[:2])
    assert [(one.label, one.task, one.scores, one.route.abstention) for one in found] == [(None, None, {}, 1.0)] * 2


def test_abstention_is_part_of_the_route(place: Path, tmp_path: Path) -> None:
    write_working_bank(tmp_path / "far", place / "base-llama", gate=GateSettings(abstention=True))
    model = AMLoRAModel.from_bank(tmp_path / "far", device="cpu")
    assert [route.abstention for route in model.route(TEXTS)] == pytest.approx([0.0] * len(TEXTS), abs=0.5)
    few = model.use_tasks(["colours", "sizes"]).route(TEXTS[0])[0]
    assert sum(few.tasks.values()) + few.abstention == pytest.approx(1.0)


def test_a_bank_that_does_not_describe_its_tasks_asks_for_labels(place: Path, tmp_path: Path) -> None:
    write_working_bank(tmp_path / "bare", place / "base-llama", described=False)
    model = AMLoRAModel.from_bank(tmp_path / "bare", device="cpu")
    with pytest.raises(UserError, match="does not describe task 'colours'; give labels"):
        model.classify(TEXTS[:1])
    assert model.classify(TEXTS[:1], ["red", "blue"])[0].label in ("red", "blue")
    assert model.classify(TEXTS[:1], ["red", "blue"], task="colours")[0].task == "colours"
    assert len(model.answer(TEXTS[:1])) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.classify(["x"], task="fruit"), "task: found 'fruit', the bank's tasks are colours"),
        (lambda m: m.answer(["big"], task=["shapes", "sizes"]), "task: found 2 for 1 texts"),
        (lambda m: m.answer(["big", " "]), "text 2 of 2 is empty"),
        (lambda m: m.to_peft("fruit"), "task: found 'fruit'"),
    ],
)
def test_wrong_calls_say_what_to_fix(model: AMLoRAModel, call, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(model)


def test_nothing_given_is_nothing_answered(model: AMLoRAModel) -> None:
    assert model.answer([]) == model.classify([]) == []


def test_a_long_text_is_cut_and_its_question_kept(model: AMLoRAModel) -> None:
    long = "the wall looks " * 100 + "red"
    found = model.classify([long, long], task="colours", question=["what", None])
    assert [one.label in TOPICS["colours"][0] for one in found] == [True, True]


def test_settings_that_do_not_fit_are_a_damaged_bank(place: Path, tmp_path: Path) -> None:
    write_working_bank(tmp_path / "odd", place / "base-llama", training_configuration={"router": {"layer": "deep"}})
    with pytest.raises(BankError, match="settings of its router"):
        AMLoRAModel.from_bank(tmp_path / "odd", device="cpu")


def test_to_peft_gives_stock_peft_with_the_logits_of_the_row(model: AMLoRAModel, t5: AMLoRAModel) -> None:
    pytest.importorskip("peft")
    for one in (model, t5):
        for place, task in enumerate(TASKS):
            tokens = one.tokenizer([f"{text}\nAnswer:" for text in TEXTS[:2]], padding=True, return_tensors="pt")
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            if one.base.encoder_decoder:
                inputs["decoder_input_ids"] = torch.zeros(2, 1, dtype=torch.long)
            gate = torch.eye(len(TASKS))[place].expand(2, -1)
            with torch.no_grad():
                expected = one(**inputs, task_gate=gate).logits
                torch.testing.assert_close(one.to_peft(task)(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_plain_base_differs_from_the_bank(model: AMLoRAModel, tmp_path: Path) -> None:
    base = load_model(resolve_base(ModelSettings(source=str(model.base_model_path)), tmp_path / "home"), dtype=torch.float32)
    tokens = model.tokenizer(f"{TEXTS[0]}\nAnswer:", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        assert not torch.allclose(base(**tokens).logits, model(**tokens).logits, atol=1e-2)


@pytest.mark.integration
def test_a_folder_is_used_without_mlflow_ray_and_deepspeed(place: Path, repository: Path) -> None:
    code = f"""
import sys
from amlora_dist.inference.model import AMLoRAModel
model = AMLoRAModel.from_bank({str(place / "llama")!r})
assert model.classify({TEXTS[:2]!r})[0].label
assert model.answer({TEXTS[:2]!r}) and model.route({TEXTS[:2]!r})
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{"mlflow", "ray", "deepspeed", "pipelines", "datasets"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize("wrong", ["the \ud83d wall", ["red"], b"red", 7, None, float("nan")])
def test_not_text_is_refused_whatever_the_call(model: AMLoRAModel, wrong: Any) -> None:
    for call in (model.route, model.answer, model.classify):
        with pytest.raises(UserError, match=r"text 2 of 2: found .*, expected a text"):
            call(["a red wall", wrong])
    if wrong is not None:
        with pytest.raises(UserError, match=r"question 1 of 1: found .*, expected a text"):
            model.answer(["a red wall"], question=[wrong])
    with pytest.raises(UserError, match=r"label 2 of 2: found .*, expected a text"):
        model.classify(["a red wall"], ["red", wrong])


def test_prompts_are_rendered_outside_the_lock_that_decoding_needs(
    model: AMLoRAModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    render = PromptTemplate.render_text

    def watched(self: PromptTemplate, *args: Any, **options: Any) -> str:
        held.append(model.prompter._lock.locked())
        return render(self, *args, **options)

    monkeypatch.setattr(PromptTemplate, "render_text", watched)
    model.answer(["a red wall"], question="Is it a new question?")
    assert held and not any(held)
