"""``amlora report``: find what a name means, write its page, and put page and pictures into MLflow."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from amlora_dist.errors import UserError
from amlora_dist.registry import tags
from amlora_dist.registry.store import Store
from amlora_dist.reporting.comparison_report import comparison_page
from amlora_dist.reporting.facts import read_run, read_thresholds
from amlora_dist.reporting.page import Page, file_name, write_page
from amlora_dist.reporting.run_report import run_page
from amlora_dist.reporting.search_page import search_page

log = logging.getLogger(__name__)

FOLDER = "report"
"""Where, among the artifacts of a run, its report and pictures go."""


def report(store: Store, name: str, file: Path) -> Page:
    """Write the report of a run, a search or a comparison to ``file``, and log it with its pictures to MLflow.

    Raises:
        UserError: none has this name, nothing of it is finished, or ``file`` cannot be written.
    """
    found = store.find_runs({tags.RUN_ID: name})
    kinds = {run.tags.get(tags.KIND): run.run for run in found}
    if "comparison" in kinds:
        comparison = store.load_json(kinds["comparison"], "comparison.json")
        if not comparison or not comparison["runs"]:
            raise UserError(f"comparison {name!r} has not finished its first runs yet: there is nothing to report")
        page = comparison_page(comparison)
    elif "search" in kinds:
        search = store.load_json(kinds["search"], "search.json")
        if not search:
            raise UserError(f"search {name!r} has not ended yet: there is nothing to report")
        page = search_page(search)
    elif "sequence" in kinds:
        facts = read_run(store, name)
        facts.foreign_above = read_thresholds(store, facts)
        page = run_page(facts)
    else:
        raise UserError(f"no run, search or comparison {name!r} at {store.connection.shown}{_known(store)}")
    write_page(page, file)
    log_page(store, kinds.get("comparison") or kinds.get("search") or kinds["sequence"], page)
    return page


def log_page(store: Store, run: str, page: Page) -> None:
    """Put a page and its charts as PNGs into a run of MLflow; what was there is replaced."""
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        write_page(page, folder / "report.html")
        for chart in page.charts:
            (folder / f"{file_name(chart.name)}.png").write_bytes(chart.png())
        store.log_artifacts(run, folder, FOLDER)


def _known(store: Store) -> str:
    runs = [run for kind in ("comparison", "search", "sequence") for run in store.find_runs({tags.KIND: kind})]
    names = list(dict.fromkeys(run.tags.get(tags.RUN_ID, "?") for run in runs))
    return f"; there are: {', '.join(names[:20])}" if names else "; nothing was run there yet"
