"""Banks from the command line: versions, pull, diff, alias, verify, prune, export, generate, classify."""

from __future__ import annotations

import csv
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from amlora_dist.adapters.router import FixedRouter
from amlora_dist.base_model import ModelSettings, resolve_base
from amlora_dist.inference.loading import remember_base
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.exports import gap_between
from amlora_dist.registry.manifest import BaseEntry
from amlora_dist.registry.runs import Runs
from amlora_dist.registry.store import Store
from pipelines.cli.bank_output import difference
from pipelines.cli.batch_inference import InputRow, drained
from pipelines.cli.exports import measure_gap
from pipelines.cli.main import app
from tests.bank_with_base import TASKS, texts_of, write_keyed_bank, write_working_bank
from tests.ports import free_port
from tests.registry.tiny_banks import publish_sequence, rewrite, tiny_adapter, tiny_bank
from tests.serving.stand_ins import stand_in
from tests.tiny_config import TOPICS

pytestmark = pytest.mark.integration  # starts processes and stores


def amlora(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def good(*arguments: str | Path, stdin: str | None = None) -> str:
    done = amlora(*arguments, stdin=stdin)
    assert done.exit_code == 0, done.output + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bank")
    write_working_bank(folder / "bank", folder / "base")
    return folder / "bank"


TEXTS = [texts_of(task, 1, "cli")[0] for task in TASKS]


# ---- texts ----------------------------------------------------------------------------------------------------


def test_classify_reads_json_lines_and_keeps_their_fields(bank: Path, tmp_path: Path) -> None:
    rows = [{"id": k, "text": text, "label": "gold"} for k, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.loads(line) for line in good("classify", bank, tmp_path / "in.jsonl", "--device", "cpu").splitlines()]
    assert [line["id"] for line in lines] == [0, 1, 2]
    assert [line["routed_to"] for line in lines] == list(TASKS)
    assert [line["input_label"] for line in lines] == ["gold"] * 3
    assert all(line["label"] in TOPICS[line["routed_to"]][0] and 0 < line["score"] <= 1 for line in lines)


def test_classify_reads_and_writes_csv(bank: Path, tmp_path: Path) -> None:
    with (tmp_path / "in.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["body", "n"], *[[text, k] for k, text in enumerate(TEXTS)]])
    good("classify", bank, tmp_path / "in.csv", "--column", "body", "-o", tmp_path / "out.csv", "--device", "cpu")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert [row["routed_to"] for row in rows] == list(TASKS)
    assert list(rows[0])[:4] == ["body", "n", "label", "score"]
    assert json.loads(rows[0]["route"])["colours"] > 0.5
    assert sorted(file.name for file in tmp_path.glob(".out*")) == []


def test_generate_takes_lines_from_standard_input_and_options_from_the_command_line(bank: Path) -> None:
    given = f"{TEXTS[0]}\n\n{json.dumps({'text': TEXTS[1], 'task': 'sizes'})}\n"
    out = [json.loads(line) for line in good("generate", bank, "--device", "cpu", stdin=given).splitlines()]
    assert [line["routed_to"] for line in out] == ["colours", "sizes"]
    assert all(isinstance(line["answer"], str) for line in out)
    named = good("generate", bank, "--task", "shapes", "--max-new-tokens", "1", "--device", "cpu", stdin=TEXTS[0])
    assert json.loads(named)["routed_to"] == "shapes"


def test_classify_takes_labels_from_the_command_line(bank: Path) -> None:
    out = json.loads(good("classify", bank, "--label", "apple", "--label", "pear", "--device", "cpu", stdin=TEXTS[0]))
    assert out["label"] in ("apple", "pear")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.jsonl", '{"text": "red wall"}\n{"body": 1}\n', "in.jsonl, line 2: text: found nothing, expected a text"),
        ("in.jsonl", '{"text": \n', "in.jsonl, line 1: found '{\"text\":', expected one JSON object"),
        ("in.csv", "a,b\n1,2\n", "no column 'text', it has a, b"),
        ("in.xlsx", "", "found suffix '.xlsx'"),
        ("in.jsonl", '{"text": "red wall", "task": "fruit"}\n', "task: found 'fruit', the bank's tasks are"),
    ],
)
def test_rows_that_cannot_be_used_are_named(bank: Path, tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    done = amlora("classify", bank, tmp_path / name, "-o", tmp_path / "out.jsonl", "--device", "cpu")
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_a_line_is_answered_before_the_next_one_comes() -> None:
    come = threading.Event()

    def slow():
        yield InputRow("1", {}, "a")
        assert come.wait(timeout=30), "the first line was kept waiting"
        for number in range(5):
            yield InputRow("2", {}, str(number))

    batches = drained(slow(), 2)
    assert [line.text for line in next(batches)] == ["a"]
    come.set()
    rest = list(batches)
    assert [line.text for batch in rest for line in batch] == list("01234")
    assert max(map(len, rest)) <= 2


# ---- exports --------------------------------------------------------------------------------------------------


def test_export_peft_needs_no_base_model(tmp_path: Path) -> None:
    tiny_bank(tmp_path / "bank")
    out = good("export", tmp_path / "bank", tmp_path / "peft")
    assert "3 PEFT adapters" in out
    assert (tmp_path / "peft" / "1-helpdesk-email" / "adapter_config.json").is_file()


def test_adapters_of_an_export_are_loaded_with_their_base_model_by_peft(bank: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    good("export", bank, tmp_path / "peft")
    for folder in sorted((tmp_path / "peft").glob("*-*")):
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert Path(loaded.peft_config["default"].base_model_name_or_path).is_absolute(), "of a local base its folder"


def test_a_base_model_that_the_bank_names_without_its_folder_is_found_by_peft_too(bank: Path, tmp_path: Path) -> None:
    base = resolve_base(ModelSettings(source=read_bank(bank).manifest.base.source), tmp_path)
    named = BaseEntry.of(base)
    assert named.source == "base", "as a run on a folder names it"
    shutil.copytree(bank, tmp_path / "bank")
    rewrite(tmp_path / "bank", base=named)
    output = good("export", tmp_path / "bank", tmp_path / "away")
    assert "warning: the adapters name 'base' as their base model, where PEFT finds none" in output
    remember_base(base)
    assert "warning" not in good("export", tmp_path / "bank", tmp_path / "peft")
    configs = sorted((tmp_path / "peft").glob("*-*/adapter_config.json"))
    assert {json.loads(one.read_text())["base_model_name_or_path"] for one in configs} == {str(base.path)}


def test_export_prints_and_stores_the_gap_to_the_mixture(bank: Path, tmp_path: Path) -> None:
    (tmp_path / "sample.txt").write_text("\n".join(TEXTS))
    options = ("--sample", tmp_path / "sample.txt", "--device", "cpu")
    out = good("export", bank, tmp_path / "top1", "--format", "top1", *options)
    assert "gap to the mixture over 3 texts" in out
    assert json.loads((tmp_path / "top1" / "export.json").read_text())["gap_to_mixture"]["texts"] == 3
    output = good("export", bank, tmp_path / "merged", "--format", "merged", "--weights", "shapes=1", *options)
    index = json.loads((tmp_path / "merged" / "export.json").read_text())
    assert index["gap_to_mixture"]["largest_logit_difference"] > 0
    share = index["gap_to_mixture"]["other_first_token"]
    assert share > 0, "one mixture for all texts answers some otherwise"
    assert f"warning: {share:.3f} of 3 texts are answered unlike the bank" in output.splitlines()[0], "the number first"
    # what was measured on the bank is what the plain model that was written does
    plain, tokenizer = (one.from_pretrained(tmp_path / "merged") for one in (AutoModelForCausalLM, AutoTokenizer))
    rows = [tokenizer(f"{text}\nAnswer:", return_tensors="pt")["input_ids"] for text in TEXTS]
    with torch.no_grad():
        merged = torch.cat([plain(input_ids=row).logits[:, -1] for row in rows])
    model = AMLoRAModel.from_bank(bank, device="cpu")
    assert index["gap_to_mixture"] == pytest.approx(gap_between(model.next_token_logits(TEXTS), merged), abs=1e-4)


def test_the_gap_of_top1_is_that_of_the_strongest_row_alone(bank: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    router = FixedRouter(TASKS, (0.5, 0.3, 0.2))
    write_working_bank(tmp_path / "mixing", bank.parent / "base", router=router)
    model = AMLoRAModel.from_bank(tmp_path / "mixing", device="cpu")
    alone = model.to_peft("colours")
    rows = [model.tokenizer(f"{text}\nAnswer:", return_tensors="pt")["input_ids"] for text in TEXTS]
    with torch.no_grad():
        strongest = torch.cat([alone(input_ids=row).logits[:, -1] for row in rows])
    expected = gap_between(model.next_token_logits(TEXTS), strongest)
    assert expected["largest_logit_difference"] > 1e-2
    assert measure_gap(model, TEXTS, None) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that is routed by plain text."""
    folder = tmp_path_factory.mktemp("keyed")
    write_keyed_bank(folder / "bank", folder / "base")
    return folder / "bank"


def run_client(client: Path, *arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["client.py", *arguments])
        runpy.run_path(str(client), run_name="__main__")


def test_the_client_for_vllm_answers_with_the_bank_s_own_labels(
    keyed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good("export", keyed, tmp_path / "vllm", "--format", "vllm", "--bucket", "gs://bucket")
    client, model = tmp_path / "vllm" / "client.py", AMLoRAModel.from_bank(keyed, device="cpu")
    capsys.readouterr()
    with stand_in(model, base=str(model.base.path)) as server:
        for text in TEXTS:
            run_client(client, str(keyed), text, server.url)
        run_client(client, str(keyed), TEXTS[0], server.url, "--free")
    assert {one["path"] for one in server.asked} == {"/v1/completions"}
    assert {one["model"] for one in server.asked} == set(TASKS)
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["answer"] for one in answers[:3]] == [one["label"] for one in answers[:3]] == model.predict(TEXTS)
    assert [one["task"] for one in answers[:3]] == [one["model"] for one in answers[:3]] == list(TASKS)
    assert (answers[3]["label"], answers[3]["answer"]) == (None, model.predict(TEXTS[0], free=True)[0])
    tokenizer = AutoTokenizer.from_pretrained(keyed.parent / "base")
    prompt = tokenizer(f"{TEXTS[0]}\nwhat ?\nAnswer:")["input_ids"]
    assert tokenizer.decode(server.asked[-1]["prompt"]) == tokenizer.decode(prompt)
    with stand_in(model) as server:
        run_client(client, str(keyed), TEXTS[0], server.url, "--ray")
    assert {one["model"] for one in server.asked} == {f"base:{TASKS[0]}"}
    with pytest.raises(SystemExit, match="cannot be reached"):
        run_client(client, str(keyed), TEXTS[0], f"http://127.0.0.1:{free_port()}")
    with pytest.raises(SystemExit, match=r"^server: found 'localhost:8000', expected http://HOST:PORT"):
        run_client(client, str(keyed), TEXTS[0], "localhost:8000")
    table = json.loads((tmp_path / "vllm" / "routing.json").read_text())
    del table["models"][TASKS[0]]  # the bank has learned a task since
    (tmp_path / "vllm" / "routing.json").write_text(json.dumps(table))
    with pytest.raises(SystemExit, match=f"task '{TASKS[0]}' is not among the exported adapters: export the bank again"):
        run_client(client, str(keyed), TEXTS[0], server.url)


def test_the_client_for_llama_cpp_sends_every_adapter_with_its_scale(
    keyed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sample.txt").write_text("\n".join(TEXTS))
    options = ("--sample", tmp_path / "sample.txt", "--device", "cpu")
    out = good("export", keyed, tmp_path / "gguf", "--format", "gguf", *options)
    gap = json.loads((tmp_path / "gguf" / "export.json").read_text())["gap_to_mixture"]
    assert "gguf of 3 tasks" in out and gap["texts"] == 3
    assert gap["largest_logit_difference"] <= 3e-3 and not gap["other_first_token"], "what fp16 rounds of logits of 4"
    client, model = tmp_path / "gguf" / "client.py", AMLoRAModel.from_bank(keyed, device="cpu")
    capsys.readouterr()
    with stand_in(model, {"other.gguf": None, **{f"{task}.gguf": task for task in reversed(TASKS)}}) as server:
        for text in TEXTS:
            run_client(client, str(keyed), text, server.url)
        run_client(client, str(keyed), TEXTS[1], server.url, "--free")
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [one["answer"] for one in answers[:3]] == [one["label"] for one in answers[:3]] == model.predict(TEXTS)
        assert (answers[3]["label"], answers[3]["answer"]) == (None, model.predict(TEXTS[1], free=True)[0])
        one = server.asked[-1]
        weights = model.route(TEXTS[1])[0].tasks
        assert one["path"] == "/completion" and one["temperature"] == 0 and one["cache_prompt"] is False
        scales = {one["id"]: one["scale"] for one in one["lora"]}
        assert scales == pytest.approx({0: 0.0} | {3 - k: weights[task] for k, task in enumerate(TASKS)})
        server.files = dict(list(server.files.items())[:2])
        with pytest.raises(SystemExit, match=r"has not loaded colours.gguf, shapes.gguf: start it with serve.sh"):
            run_client(client, str(keyed), TEXTS[1], server.url)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "merged", "--sample", "x.txt"), "belongs to --format merged, which needs at least one"),
        (("--format", "top1"), "--format top1 needs --sample FILE"),
        (("--weights", "a=1"), "belongs to --format merged"),
        (("--format", "merged", "--weights", "a"), "found 'a', expected TASK=WEIGHT"),
        (("--format", "gguf", "--served-base", "owner/name"), "--served-base belongs to --format vllm"),
    ],
)
def test_export_options_that_do_not_fit_are_named(bank: Path, tmp_path: Path, options: tuple, message: str) -> None:
    done = amlora("export", bank, tmp_path / "out", *options)
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()


def test_import_peft_makes_a_bank_that_classifies(bank: Path, tmp_path: Path) -> None:
    good("export", bank, tmp_path / "peft")
    (tmp_path / "fruit.txt").write_text("\n".join(texts_of("fruit", 40)))
    common = ("--sample", tmp_path / "fruit.txt", "--label", "apple", "--label", "plum")
    out = good("import-peft", tmp_path / "peft" / "1-colours", tmp_path / "more", "--task", "fruit", "--onto", bank, *common)
    assert "bank of 4 adapters" in out
    found = json.loads(good("classify", tmp_path / "more", "--device", "cpu", stdin=texts_of("fruit", 1, "new")[0]))
    assert found["routed_to"] == "fruit" and found["label"] in ("apple", "plum")


# ---- folders --------------------------------------------------------------------------------------------------


def test_verify_tells_a_good_folder_from_a_damaged_one(tmp_path: Path) -> None:
    manifest = tiny_bank(tmp_path / "bank")
    assert f"digest {manifest.digest()}" in good("verify", tmp_path / "bank")
    file = tmp_path / "bank" / manifest.adapters[1].folder / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    done = amlora("verify", tmp_path / "bank")
    assert done.exit_code == 2 and "2-agnews" in done.stderr and "digest" in done.stderr


def test_diff_says_what_changed_between_two_banks(tmp_path: Path) -> None:
    first = tiny_bank(tmp_path / "one", ["a", "b"])
    adapters = [tiny_adapter("a", 1), tiny_adapter("b", 2, seed=9), tiny_adapter("c", 3)]
    second = tiny_bank(tmp_path / "two", ["a", "b", "c"], adapters=adapters)
    found = difference(first, second)
    assert found["adapters"] == {
        "a": "same adapter", "b": "another adapter (rank 2 -> 2)", "c": "added (adapter 3, rank 2)"
    }  # fmt: skip
    assert found["scores"] == {"a": [0.5, 0.5], "b": [0.5, 0.5], "c": [None, 0.5]}
    assert found["router"] == "posterior, other keys" and found["base"] == "the same"
    assert difference(second, first)["adapters"]["c"] == "removed"
    shown = good("diff", tmp_path / "one", tmp_path / "two")
    assert "c: added (adapter 3, rank 2)  accuracy - -> 0.500" in shown
    assert json.loads(good("diff", tmp_path / "one", tmp_path / "one", "--json"))["router"] == "the same"


# ---- versions in MLflow ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a registered model of three versions; tests that change something use names of their own."""
    home = tmp_path_factory.mktemp("published") / "home"
    publish_sequence(Store.open(home), "helpdesk", tmp_path_factory.mktemp("work"))
    return home


@pytest.fixture
def home(published: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AMLORA_HOME", str(published))
    return published


@pytest.mark.integration
def test_versions_aliases_pull_and_verify(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is models:/helpdesk/2" in good("alias", "helpdesk", "2", "champion")
    assert "(before: version 2)" in good("alias", "helpdesk", "3", "champion")
    listed = json.loads(good("versions", "helpdesk", "--json"))
    assert [line["version"] for line in listed] == [1, 2, 3]
    assert [len(line["tasks"]) for line in listed] == [1, 2, 3]
    assert sorted(listed[2]["aliases"]) == ["champion", "current"]
    assert "champion" in good("versions", "helpdesk")
    for wrong, message in (("current", "follows the newest"), ("v3", "not a version number")):
        done = amlora("alias", "helpdesk", "1", wrong)
        assert done.exit_code == 2 and message in done.stderr
    done = amlora("versions", "helpdesc")
    assert done.exit_code == 2 and "there are: helpdesk" in done.stderr
    assert "models:/helpdesk/3: good; 3 adapters" in good("verify", "models:/helpdesk@champion")
    assert "added (adapter 3, rank 2)" in good("diff", "models:/helpdesk/2", "models:/helpdesk/3")

    fetched: list[str] = []
    plain = Runs.download

    def counting(self: Runs, run: str, path: str, folder: Path, **more: Any) -> Any:
        fetched.append(path)
        return plain(self, run, path, folder, **more)

    monkeypatch.setattr(Runs, "download", counting)
    good("pull", "models:/helpdesk/2", tmp_path / "two")
    assert sum("adapter_model" in path for path in fetched) == 2
    fetched.clear()
    assert "is in" in good("pull", "models:/helpdesk@champion", tmp_path / "three", "--statistics")
    assert sum("adapter_model" in path for path in fetched) == 1, "two adapters were there, next to it"
    assert len(read_bank(tmp_path / "three").statistics) == 3
    fetched.clear()
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes standard error for a terminal
    monkeypatch.setenv("TERM", "xterm")
    drawn = amlora("pull", "models:/helpdesk@champion", tmp_path / "bar").stderr
    assert "4/4" in drawn and "━" in drawn
    monkeypatch.delenv("FORCE_COLOR")
    good("pull", "models:/helpdesk@champion", tmp_path / "three")
    assert not any("adapter_model" in path for path in fetched)


@pytest.mark.integration
def test_prune_refuses_what_others_refer_to_and_removes_the_rest(home: Path, tmp_path: Path) -> None:
    store = Store.open(home)
    publish_sequence(store, "pruned", tmp_path / "work", tasks=("a", "b"))
    done = amlora("prune", "pruned", "1", "--yes")
    assert done.exit_code == 2
    assert "models:/pruned/1 has to stay: models:/pruned/2 keeps parts there" in done.stderr
    assert "alias 'current' points at it" in amlora("prune", "pruned", "2", "--yes").stderr
    assert "every version counts" in good("prune", "pruned")
    other = publish_sequence(store, "other", tmp_path / "work", tasks=("x", "y"))
    store.set_alias("other", tags.CURRENT, other[0])
    assert "would be deleted; add --yes" in good("prune", "other", "2")
    assert len(store.versions("other")) == 2, "a dry run"
    assert "models:/other/2 deleted" in good("prune", "other", "2", "--yes")
    assert [version.number for version in store.versions("other")] == [1]
    assert not store.has_artifact(other[1].run, other[1].artifact_path)
    good("verify", "models:/other/1")
    assert "no version 7; there are [1]" in amlora("prune", "other", "7").stderr


@pytest.mark.integration
def test_a_model_comes_straight_from_the_registry(home: Path, tmp_path: Path) -> None:
    """The developer's journey: a published bank, by its URI, in a process of its own, line by line."""
    store = Store.open(home)
    write_working_bank(tmp_path / "bank", tmp_path / "base")
    parent = store.parent_run("journey", "journey", {})
    run = store.stage_run(parent, "3 sizes", "f" * 64)
    place = store.placement("journey", run, 1)
    bank = read_bank(tmp_path / "bank")
    import dataclasses

    rewrite(
        tmp_path / "bank",
        adapters=[dataclasses.replace(line, stored=place.of(line.folder)) for line in bank.manifest.adapters],
        statistics=[dataclasses.replace(part, stored=place.of(part.file)) for part in bank.manifest.statistics],
        run_id="journey",
        epoch=1,
    )
    values = {tags.TRAINING_FINGERPRINT: "f" * 64, tags.RUN_ID: "journey"}
    store.publish("journey", tmp_path / "bank", stage_run=run, tags=values, epoch=1, guard=lambda: None)
    arguments = ["classify", "models:/journey@current", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *arguments], text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdin and process.stdout and process.stderr
        watch = threading.Timer(240, process.kill)
        watch.start()
        try:
            for text, task in zip(TEXTS, TASKS, strict=True):  # each is answered while standard input stays open
                process.stdin.write(text + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
                assert line, process.stderr.read()
                assert json.loads(line)["routed_to"] == task
            process.stdin.close()
            assert process.wait() == 0, process.stderr.read()
        finally:
            watch.cancel()
            process.kill()
