"""Digests of what every method trains, so that a change that must not change a bit can be shown not to.

    python benchmarks/adapter_digests.py before.json                     at one commit
    python benchmarks/adapter_digests.py after.json --against before.json    at another one; exit code 1 where one differs

Trains each method, and the settings that take other paths through the layers, on a tiny random model with three tasks, in
this process: of every stage the fingerprint of training and the digests of the adapter, of its statistics and of what the
method keeps, and of every run its accuracy matrix. The code that is measured is the one that ``PYTHONPATH`` names first, so
that this file can be run on commits that do not have it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
sys.path.append(str(Path(__file__).resolve().parents[1]))

TRAINING = {
    "epochs": 2, "batch_size": 6, "learning_rate": 3e-2, "warmup_steps": 2, "checkpoint_every": 50, "probe_rows": 8,
}  # fmt: skip
LITERAL = {"background": False, "kind": "literal"}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> kind of model, and keys of the configuration."""
    from amlora_dist.methods import METHODS

    found = {name: ("llama", {"method": name}) for name in METHODS}
    found |= {f"t5 {name}": ("t5", {"method": name}) for name in ("am_lora", "l2p", "lwf")}
    for scope in ("token", "sequence"):
        for kind in ("llama", "t5"):
            found[f"literal {scope} {kind}"] = (kind, {"router": LITERAL | {"literal": {"granularity": scope}}})
    found["packing"] = ("llama", {"training": TRAINING | {"packing": True}})
    found["dropout"] = ("llama", {"training": TRAINING, "adapters": {"dropout": 0.1}})
    found["smoothing"] = ("llama", {"training": TRAINING | {"label_smoothing": 0.1}})
    found["checkpointing"] = ("llama", {"training": TRAINING | {"gradient_checkpointing": True}})
    found["all layers"] = ("llama", {"adapters": {"layers": "all"}})
    found["upper layers"] = ("llama", {"adapters": {"layers": "last:2"}})
    found["trunk cache"] = ("llama", {"adapters": {"layers": "last:2"}, "training": TRAINING | {"cache_trunk": True}})
    found["prompt format 1"] = ("llama", {"prompt_format": 1})
    found["literal two stages"] = ("llama", {"router": LITERAL | {"literal": {"training": "two_stage"}}})
    return found


def digests(folder: Path, kind: str, more: dict[str, Any], empty: Path) -> dict[str, Any]:
    """Of one run in ``folder``, whose home begins as a copy of ``empty``."""
    import yaml

    from amlora_dist.digests import tensors_digest
    from amlora_dist.training.result import read_result
    from pipelines import Sequence
    from tests.tiny_config import write_config

    os.environ["AMLORA_HOME"] = str(folder / "home")
    shutil.copytree(empty, folder / "home")
    file = write_config(folder, kind)
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["training"] = TRAINING
    config["evaluation"] = config["evaluation"] | {"oracle": False, "untrained": False}
    for key, value in more.items():
        config[key] = config.get(key, {}) | value if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    with redirect_stderr(io.StringIO()):
        result = Sequence(file, run_id="digests").run().mapping
    stages: dict[str, Any] = {}
    for trained in sorted((folder / "home").glob("storage/stages/*/trained")):
        found = read_result(trained)
        state = tensors_digest(found.method_state) if found.method_state else None
        stages[found.adapter.task] = {
            "fingerprint": trained.parent.name,
            "adapter": found.adapter.digest(),
            "statistics": tensors_digest(found.statistics.tensors()),
            "state": state,
        }
    return {"stages": stages, "matrix": result["accuracy_matrix"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="is written: JSON")
    parser.add_argument("--against", type=Path, help="digests of another commit")
    parser.add_argument("--only", default="", help="comma-separated names of cases; default: all")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else []
    found: dict[str, Any] = {}
    from amlora_dist.registry.store import Store

    empty = Path(tempfile.mkdtemp(prefix="digests-")) / "empty"
    Store.open(empty)
    for name, (kind, more) in cases().items():
        if wanted and name not in wanted:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="digests-") as folder:
            try:
                found[name] = digests(Path(folder), kind, more, empty)
            except Exception as error:  # noqa: BLE001 (the others are of interest all the same)
                found[name] = {"error": str(error).replace(folder, "")}
        print(f"{name}: {found[name].get('error', 'trained')} in {time.monotonic() - began:.1f} s", flush=True)
    shutil.rmtree(empty.parent)
    options.file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.against is None:
        return
    before = json.loads(options.against.read_text(encoding="utf-8"))
    differ = [name for name, one in found.items() if before.get(name) != one]
    print(f"{len(found) - len(differ)} of {len(found)} equal" + (f"; other: {', '.join(differ)}" if differ else ""))
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
