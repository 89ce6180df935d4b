"""Versions of a bank that differ in their answers, and clients who check every one of them."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.registry import tags
from amlora_dist.registry.bank_folder import read_bank
from amlora_dist.registry.store import Store
from amlora_dist.registry.versions import Version
from tests.bank_with_base import texts_of, write_working_bank
from tests.registry.tiny_banks import fingerprint, rewrite

VERSIONS = [("colours", "shapes"), ("colours", "shapes", "sizes"), ("shapes", "colours", "sizes")]
"""Tasks of each version, in order."""
TEXTS = [text for task in VERSIONS[1] for text in texts_of(task, 3, "load")]
NEW_TOKENS = 5


def write_versions(folder: Path) -> list[Path]:
    """A folder for each version, on one base model."""
    for number, tasks in enumerate(VERSIONS, start=1):
        write_working_bank(folder / f"v{number}", folder / "base", tasks=tasks)
    return [folder / f"v{number}" for number in range(1, len(VERSIONS) + 1)]


def publish(store: Store, name: str, folder: Path) -> Version:
    """Register a folder's bank as the next version."""
    bank = read_bank(folder)
    print_of = fingerprint(name, *bank.manifest.tasks)
    run = store.stage_run(store.parent_run(name, name, {}), folder.name, print_of)
    place = store.placement(name, run, 1)
    rewrite(
        folder,
        adapters=[dataclasses.replace(line, stored=place.of(line.folder)) for line in bank.manifest.adapters],
        statistics=[dataclasses.replace(part, stored=place.of(part.file)) for part in bank.manifest.statistics],
        run_id=name,
        epoch=1,
    )
    values = {tags.TRAINING_FINGERPRINT: print_of, tags.RUN_ID: name}
    return store.publish(name, folder, stage_run=run, tags=values, epoch=1, guard=lambda: None)


def expected(model: AMLoRAModel) -> dict[tuple[str, str], Any]:
    """What a version says to each text, by kind of request and text."""
    labels = model.classify(TEXTS)
    found: dict[tuple[str, str], Any] = {("label", text): one.label for text, one in zip(TEXTS, labels, strict=True)}
    answers = model.predict(TEXTS, max_new_tokens=NEW_TOKENS)
    return found | {("answer", text): one for text, one in zip(TEXTS, answers, strict=True)}


def ask_all(
    url: str,
    right: dict[str, tuple[Sequence[str], dict[tuple[str, str], Any]]],
    *,
    requests: int,
    clients: int,
    at: dict[int, Callable[[], Any]],
    key: str | None = None,
) -> Counter[str]:
    """Send ``requests`` requests of both kinds from ``clients`` threads; each answer must be, in all its parts, that
    of the version that it names.

    Args:
        url: of the server.
        right: tasks and ``expected`` answers by version.
        requests: in all.
        clients: threads.
        at: what to do when so many requests were sent.
        key: that the server asks for.

    Returns:
        how many answers came from each version.
    """
    lock, sent, versions, wrong = threading.Lock(), 0, Counter[str](), list[str]()

    def work() -> None:
        nonlocal sent
        headers = {"authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=url, timeout=60, headers=headers) as client:
            while True:
                with lock:
                    number = sent
                    sent += 1
                if number >= requests:
                    return
                if number in at:
                    at[number]()
                text = TEXTS[number % len(TEXTS)]
                kind = "label" if number % 3 == 0 else "answer"
                body: dict[str, Any] = {"routing": True}
                if kind == "label":
                    answer = client.post("/v1/classifications", json=body | {"input": text})
                else:
                    answer = client.post("/v1/completions", json=body | {"prompt": text, "max_tokens": NEW_TOKENS})
                fault = _fault(answer, kind, text, right)
                with lock:
                    if fault:
                        wrong.append(f"request {number}: {fault}")
                    else:
                        versions[answer.json()["system_fingerprint"]] += 1

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
        assert not thread.is_alive()
    assert wrong == []
    assert versions.total() == requests
    return versions


def _fault(answer: httpx.Response, kind: str, text: str, right: dict[str, Any]) -> str | None:
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text}"
    response = answer.json()
    tasks, answers = right[response["system_fingerprint"]]
    part = response["data"][0] if kind == "label" else response["choices"][0]
    found = part["label"] if kind == "label" else part["text"]
    if list(part["routing"]["tasks"]) != list(tasks):
        return f"{response['system_fingerprint']} has tasks {list(tasks)}, routed over {list(part['routing']['tasks'])}"
    if found != answers[kind, text]:
        return f"{response['system_fingerprint']} says {answers[kind, text]!r} to {text!r}, not {found!r}"
    return None
