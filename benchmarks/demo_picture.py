"""The result of a run as a picture of the terminal: ``python benchmarks/demo_picture.py demo docs/images/demo.svg``."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console

from pipelines.cli.tables import show_result
from pipelines.runs.results import load_result


def main() -> None:
    """Draw what ``amlora show RUN`` prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run id")
    parser.add_argument("file", type=Path, help="the SVG to write")
    arguments = parser.parse_args()
    result = load_result(arguments.run)
    console = Console(record=True, width=116, file=io.StringIO(), force_terminal=True)
    show_result(result, console)
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(arguments.file), title=f"amlora show {arguments.run}")


if __name__ == "__main__":
    main()
