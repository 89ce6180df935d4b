"""Bad input: exit code 2, one message that names file, key, value and fix, and nothing written, no process started."""

from __future__ import annotations

import ast
import functools
import io
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import huggingface_hub
import psutil
import pytest
import torch
import typer

from amlora_dist.base_model import ModelSettings, check_weights, load_model, load_tokenizer, meta_model, resolve_base
from amlora_dist.errors import UserError
from pipelines.cli.main import app
from pipelines.runs import sequence
from tests.pipelines.bad_inputs import AGAIN, CASES, edit
from tests.pipelines.bad_models import MODELS, changed, with_code
from tests.tiny_config import write_config, write_model

REGISTRY = ("a tracking store", "a tracking server", "a database", "a home", "a registered model")
"""These are found out by the store itself, which may be opened."""
NOISE = (
    "Traceback", "Error", "[Errno", "Value error", "Assertion", "pydantic", "sqlalchemy", "<class", "object at 0x",
    "WARNING", "INFO", "None", "regex", "pattern", "\x1b",
)  # fmt: skip
"""What libraries and Python say."""
LONGEST = 500
"""Characters of a message, without the folder of the test; the longest one lists the built-in tasks."""


def amlora(arguments: Sequence[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, with what C libraries write."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as leaving:
        command()(list(arguments), prog_name="amlora")
    return int(leaving.value.code or 0), *capfd.readouterr()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny", "llama")


@functools.cache
def command() -> Callable[..., object]:
    """The command line; made once, for that takes longer than most of the cases."""
    return typer.main.get_command(app)


@pytest.mark.parametrize("case", [*CASES, *MODELS])
def test_bad_input_is_reported_and_nothing_is_written(
    case: str,
    model: Path,
    tmp_path: Path,
    amlora_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage, expected = (CASES | MODELS)[case]
    shutil.copytree(model, tmp_path / "model-llama")
    config = write_config(tmp_path)
    for name, value in (damage(tmp_path, config) or {}).items():
        monkeypatch.setenv(name, value)

    def no_store(*args: object, **kwargs: object) -> object:
        raise AssertionError("the store was opened before the input was checked")

    if not case.startswith(REGISTRY):
        monkeypatch.setattr(sequence.Store, "open", no_store)
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    before, processes = files(tmp_path), psutil.Process().children(recursive=True)
    code, out, err = amlora([part.format(folder=tmp_path) for part in expected.command], capfd)
    assert (code, out) == (2, ""), err
    for name, part in expected._asdict().items():
        assert name == "command" or part.format(folder=tmp_path) in err, f"no {name}: {err}"
    first, *more = err.splitlines()
    assert first.startswith("error: ") and all(line.startswith("  - ") or line == AGAIN for line in more), err
    assert len(more) <= 2, f"one message about one fault: {err}"
    shown = err.replace(str(tmp_path), "")
    assert not [word for word in NOISE if word in shown], err
    assert len(shown) <= LONGEST, err
    assert files(tmp_path) == before, "nothing is written"
    assert psutil.Process().children(recursive=True) == processes, "nothing is started"


def files(folder: Path) -> dict[str, bytes]:
    """All files with what they hold, but for the cache of models' digests and locks."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    kept = {name: path for name, path in found.items() if not name.startswith("home/cache/") and path.suffix != ".lock"}
    return {name: path.read_bytes() for name, path in kept.items()}


def test_there_are_forty_kinds_of_bad_input_and_more() -> None:
    assert len(CASES) >= 40


def test_remote_code_never_runs_whatever_standard_input_says(
    model: Path, tmp_path: Path, amlora_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "model-llama"
    shutil.copytree(model, own)
    with_code(own, model_type="own", architectures=["OwnForCausalLM"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    code, _, err = amlora(["run", str(write_config(tmp_path)), "--run-id", "yes"], capfd)
    assert code == 2 and "is never run" in err and "[y/N]" not in err
    assert not (own / "RAN").exists()
    assert sys.stdin.read() == "y\n" * 100, "nobody asked"


def test_a_model_that_transformers_makes_itself_is_made_without_the_code_next_to_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own"
    shutil.copytree(model, own)
    with_code(own)
    changed(own / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_own.Own"]})
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    base = resolve_base(ModelSettings(source=str(own)), tmp_path / "home")
    loaded = load_model(base, dtype=torch.float32)
    tokenizer = load_tokenizer(base.path)
    check_weights(base, meta_model(base))
    assert type(loaded).__module__.startswith("transformers.") and type(tokenizer).__module__.startswith("transformers.")
    assert not (own / "RAN").exists()
    assert sys.stdin.read() == "y\n" * 100, "nobody asked"


def test_remote_code_and_quantised_weights_of_the_hub_are_refused_before_the_weights_are_fetched(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    shutil.copytree(model, tmp_path / "snapshot")
    assert resolve_base(ModelSettings(source="some/model"), tmp_path / "home").path == tmp_path / "snapshot"
    assert "*.safetensors" not in asked[0] and "*.safetensors" in asked[1]
    with_code(tmp_path / "snapshot", architectures=["OwnForCausalLM"])
    with pytest.raises(UserError, match="is never run"):
        resolve_base(ModelSettings(source="some/model"), tmp_path / "home")
    changed(tmp_path / "snapshot" / "config.json", auto_map=None, quantization_config={"quant_method": "awq"})
    with pytest.raises(UserError, match="quantised with awq"):
        resolve_base(ModelSettings(source="some/model"), tmp_path / "home")
    assert len(asked) == 4 and all("*.safetensors" not in patterns for patterns in asked[2:])


@pytest.mark.parametrize("package", ["amlora_dist", "pipelines", "benchmarks"])
def test_every_call_that_could_run_remote_code_says_no(package: str) -> None:
    files = sorted((Path(__file__).parents[2] / package).rglob("*.py"))
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Call)]
    loading = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("from_")]
    autos = [call for call in loading if re.match(r"(transformers\.)?Auto[A-Z]|auto", ast.unparse(call.func))]
    autos = [call for call in autos if call.func.attr in ("from_pretrained", "from_config")]
    assert autos or package == "pipelines"
    for call in autos:
        shown = {key.arg: ast.unparse(key.value) for key in call.keywords}
        assert shown.get("trust_remote_code") == "False", ast.unparse(call)
    assert not [call for call in calls if ast.unparse(call.func) in ("input", "typer.confirm", "typer.prompt")]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("training.epoch=3", ["training.epoch:", "an unknown key", "did you mean 'epochs'?"]),
        ("training.epochs", ["'training.epochs'", "key.path=value"]),
        ("training.epochs=two", ["training.epochs:", "'two'", "a whole number"]),
        ("training.epochs=[1", ["training.epochs:", "'[1'", "a YAML value", "expected ',' or ']'"]),
        ("sed=3", ["sed:", "an unknown key", "did you mean 'seed'?"]),
        ("workers=-1", ["workers:", "found -1", "at least 0"]),
        ("tasks[7]=imdb", ["tasks[7]:", "a list with 3 items", "an item number 7 to replace"]),
        ("router.layer=40", ["router.layer:", "found 40", "expected 0 to 3"]),
    ],
)
def test_bad_overrides_are_reported(
    overrides: str, expected: list[str], model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model, tmp_path / "model-llama")
    code, _, err = amlora(["run", str(write_config(tmp_path)), "--run-id", "bad", overrides], capfd)
    assert code == 2, err
    assert all(part in err for part in ["command line", *expected]), err


def test_every_fault_is_reported_at_once(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "model-llama")
    config = write_config(tmp_path)
    for change in (edit(adapters__rank=0), edit(training__epochs="many"), edit(sed=1)):
        change(tmp_path, config)
    code, _, err = amlora(["validate", str(config)], capfd)
    assert code == 2
    assert all(part in err for part in ("3 faults", "adapters.rank", "training.epochs", "sed"))
