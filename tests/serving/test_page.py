"""The page at /: a text is tried in a real browser, and its routing seen."""

from __future__ import annotations

import asyncio
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from amlora_dist.config.loading import load_config
from amlora_dist.inference.model import AMLoRAModel
from amlora_dist.serving.bank import ServedBank
from tests.bank_with_base import texts_of
from tests.serving.chromium import PROGRAM, opened
from tests.serving.servers import Running, running

TEXT = texts_of("shapes", 1, "page")[0]


def test_the_page_is_whole_in_itself(server: Running) -> None:
    answer = server.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(src|href)=["'](?!data:)""", answer.text)


@pytest.mark.integration
@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_a_text_is_classified_and_answered_and_its_routing_shown(
    server: Running, model: AMLoRAModel, tmp_path: Path
) -> None:
    async def visit() -> None:
        async with opened(server.url, tmp_path / "profile") as page:
            await page.until("document.querySelectorAll('#model option').length === 4")
            assert await page.value("document.getElementById('name').textContent") == "words"
            await page.value(f"document.getElementById('text').value = {TEXT!r}")
            await page.value("document.getElementById('classify').click()")
            await page.until("document.querySelectorAll('#labels .bar').length === 3")
            label = model.classify(TEXT)[0].label
            assert await page.value("document.getElementById('answer').textContent") == label
            rows = await page.value("[...document.querySelectorAll('#bars .bar')].map(row => row.textContent)")
            assert [row.startswith(task) for row, task in zip(rows, model.tasks, strict=True)] == [True] * 3
            assert rows[1] == "shapes100.0%"
            await _pictured(page, tmp_path)
            await page.value("document.getElementById('write').click()")
            await page.until("document.getElementById('note').textContent.includes('ms')")
            assert await page.value("document.getElementById('answer').textContent") == model.predict(TEXT)[0]
            assert (await page.value("document.getElementById('note').textContent")).startswith("as shapes, ")
            # what a bank's author wrote is text, never markup; and errors are shown
            await page.value("document.getElementById('text').value = 'x'.repeat(40000)")
            await page.value("document.getElementById('classify').click()")
            error_text = await page.until("document.getElementById('error').textContent")
            assert "expected at most 32768" in error_text
            assert page.complaints == ["Failed to load resource: the server responded with a status of 400 (Bad Request)"]

    asyncio.run(visit())


@pytest.mark.integration
@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_the_page_asks_for_the_key_where_one_is_needed(model: AMLoRAModel, tmp_path: Path) -> None:
    async def visit(url: str) -> None:
        async with opened(url, tmp_path / "profile") as page:
            await page.until("!document.getElementById('keybox').hidden")
            await page.value("document.getElementById('key').value = 's3cret'")
            await page.value("document.getElementById('key').dispatchEvent(new Event('change'))")
            await page.until("document.querySelectorAll('#model option').length === 4")
            assert await page.value("document.querySelectorAll('#model option').length") == 4

    with running(ServedBank(model, "words"), key="s3cret") as server:
        asyncio.run(visit(server.url))


async def _pictured(page: object, folder: Path) -> None:
    """A picture for people, where they ask for one."""
    from tests.serving.chromium import Page

    assert isinstance(page, Page)
    file = Path(os.environ.get("AMLORA_PICTURES") or folder) / "page.png"
    await page.picture(file)
    assert file.stat().st_size > 5000


class _Elements(HTMLParser):
    """Ids, what labels are for, and the scripts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self.script = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.labelled += [given["for"] or ""] if "for" in given else []
        self._inside = tag

    def handle_data(self, data: str) -> None:
        self.script += data if self._inside == "script" else ""


def test_the_script_names_elements_that_exist_and_paths_that_answer(server: Running) -> None:
    page = _Elements()
    page.feed(server.client.get("/").text)
    assert len(page.ids) == len(set(page.ids))
    needed = {
        "text", "classify", "write", "spinner", "examples", "tasks", "knows", "bars", "labels", "curl", "python", "schema",
    }  # fmt: skip
    assert needed <= set(page.ids)
    named = set(re.findall(r"""(?:at|show)\("([\w-]+)\"""", page.script))
    for group in re.findall(r"for \(const id of \[([^\]]+)\]", page.script):
        named |= set(re.findall(r'"([\w-]+)"', group))
    assert len(named) > 20
    assert named | set(page.labelled) <= set(page.ids)
    assert set(page.ids) - named - set(page.labelled) == set(), "elements that nothing fills or reads"
    paths = set(re.findall(r"""["'](/[\w./{}-]+)["']""", page.script))
    known = set(server.client.get("/openapi.json").json()["paths"])
    assert paths == {"/v1/models", "/v1/classifications", "/v1/completions", "/openapi.json"}
    assert paths - {"/openapi.json"} <= known
    assert server.client.get("/openapi.json").status_code == 200


def test_the_page_knows_the_demos_tasks_and_is_readable_on_a_phone_and_in_the_dark(
    server: Running, repository: Path
) -> None:
    text = server.client.get("/").text
    shown = set(re.findall(r'"(helpdesk/\w+)":', text))
    assert shown == set(load_config(repository / "configs" / "demo.yaml").tasks)
    assert "@media screen and (prefers-color-scheme: dark)" in text, "paper is white"
    assert "@media (max-width: 36rem)" in text and "@media print" in text
    assert not re.search(r"https?://", text)  # nothing is fetched from elsewhere
