"""What is wrong with a body, in OpenAI's form: each fault at its place, in words of the API and not of the checker."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from amlora_dist.serving import messages as wire

MOST_FAULTS = 20
MAX_QUOTED = 300
"""Characters of a place or a reason: a client's own keys may be among them."""


def detail_of(faults: Iterable[Mapping[str, Any]]) -> wire.ErrorDetail:
    """The faults that pydantic found in a body, as one error; what was found is not repeated."""
    lines: dict[str, None] = {}
    first: str | None = None
    for fault in list(faults)[:MOST_FAULTS]:
        if fault["type"] == "json_invalid":
            lines["body: found no JSON object, expected one"] = None
            continue
        place = _place(fault)
        first = first or place or None
        lines[f"{place or 'body'}: {str(fault['msg'])[:MAX_QUOTED]}"] = None
    return wire.ErrorDetail(message="; ".join(lines), type="invalid_request_error", param=first)


def unread() -> wire.ErrorDetail:
    """Of a body that is not even text."""
    return wire.ErrorDetail(
        message="body: found what cannot be read as JSON, expected one JSON object in UTF-8", type="invalid_request_error"
    )


def _place(fault: Mapping[str, Any]) -> str:
    """The way to a value. Where it may be of several kinds, pydantic puts the kind's own name in between."""
    way = list(fault["loc"][1:])
    own = way[-1:] if fault["type"] == "extra_forbidden" else []
    known = [part for part in way[: len(way) - len(own)] if isinstance(part, int) or part in _keys()]
    return ".".join(str(part)[:MAX_QUOTED] for part in (*known, *own))


@cache
def _keys() -> frozenset[str]:
    """Every key that a request may have."""
    models = [one for _, one in inspect.getmembers(wire, inspect.isclass) if issubclass(one, BaseModel)]
    return frozenset(name for model in models for name in model.model_fields)
