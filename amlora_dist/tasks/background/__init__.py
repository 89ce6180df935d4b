"""The background: short texts of many kinds that belong to no task, written by the project and shipped as data.

Keys made of them are next to a bank's: a text that is likelier under the background than under every task belongs to
no task. One Gaussian is fitted for each part, so a part is one kind of text and its texts are as varied as the kind is.
Each part is one file, ``PART.jsonl``, of lines ``{"text": ...}``. A comparison with a public data set leaves out the parts
of the set's own kind (``reading_yes_no`` for yes-or-no reading, ``pairs_inference`` for inference, and so on).
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from amlora_dist.digests import value_digest
from amlora_dist.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SUFFIX = ".jsonl"


@cache
def parts() -> tuple[str, ...]:
    """Names of all parts, sorted."""
    names = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


@cache
def texts(part: str) -> tuple[str, ...]:
    """The texts of one part, in the order of its file.

    Raises ``UserError`` for a part that does not exist.
    """
    if part not in parts():
        raise UserError(f"background: no part is called {part!r}; the parts are {', '.join(parts())}")
    lines = files(__name__).joinpath(part + _SUFFIX).read_text(encoding="utf-8").split("\n")
    return tuple(json.loads(line)["text"] for line in lines if line)


def digest(names: Sequence[str] | None = None) -> str:
    """sha256 over names and texts of the given parts, whatever their order; of all parts by default.

    Raises ``UserError`` for a part that does not exist.
    """
    return value_digest({name: list(texts(name)) for name in (parts() if names is None else names)})
