"""What `make demo` ends with, as a picture: ``python benchmarks/demo_picture.py demo docs/images/demo.svg``.

The run's tables as ``amlora show`` prints them, and the answers of its served bank to the five tickets of the Makefile as
``amlora ask`` prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipelines.cli.scoring import ask
from pipelines.cli.tables import show_result
from pipelines.runs.results import load_result

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"


def tickets() -> list[str]:
    """The texts that ``make demo`` asks its bank, as the shell reads them."""
    found = re.search(r"^TICKETS = ((?:.*\\\n)*.*)", MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, f"{MAKEFILE} has no TICKETS"
    return shlex.split(found[1].replace("\\\n", " "))


def asked(bank: str, texts: list[str]) -> list[str]:
    """Lines that ``amlora ask`` prints into a pipe."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ask(bank, texts, [], {}, as_json=False)
    return [line.rstrip() for line in printed.getvalue().splitlines()]


def main() -> None:
    """Draw what ``amlora show RUN`` and ``amlora ask`` print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run id")
    parser.add_argument("file", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    result = load_result(arguments.run)
    bank = f"models:/{result['registered_model']}@champion"
    heading, *answers = asked(bank, tickets())
    console = Console(record=True, width=116, file=io.StringIO(), force_terminal=True)
    show_result(result, console)
    console.print(Text(f"\n$ amlora ask {bank} TICKET...   # five texts, nothing told\n", style="dim"))
    console.print(Text(heading, style="bold"))
    for line in answers:
        console.print(Text(line), no_wrap=True)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(arguments.file), title="make demo")


if __name__ == "__main__":
    main()
