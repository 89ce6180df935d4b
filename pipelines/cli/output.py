"""Results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Inside, whatever is written to standard output, by C libraries too, goes to standard error."""
    sys.stdout.flush()
    stdout, sys.stdout = sys.stdout, sys.stderr
    old_stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout = stdout
        os.dup2(old_stdout, 1)
        os.close(old_stdout)


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()
