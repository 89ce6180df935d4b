"""Requests that are nearly right: drawn by number, so that a failure can be sent again."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "red wall", "max_tokens": 4, "temperature": 0.7, "top_p": 0.9, "seed": 1, "stop": ["x"]}),
    ("/v1/completions", {"prompt": ["red wall", "big house"], "model": "words:sizes", "n": 1, "routing": True}),
    ("/v1/completions", {"prompt": "red wall", "raw": True, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {
        "messages": [
            {"role": "system", "content": "what ?"}, {"role": "user", "content": [{"type": "text", "text": "red"}]}
        ],
        "max_completion_tokens": 3, "response_format": {"type": "text"}, "tools": [], "metadata": {}, "store": False,
    }),
    ("/v1/classifications", {"input": ["red wall", "round ball"], "labels": ["red", "blue"], "question": "what ?"}),
    ("/v1/classifications", {"input": "red wall", "model": "words:colours", "routing": True}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**40, 0.5, -0.0, 1e-310, 1e308, 5e-324, "", " ", "\n", "red",
    "\u0000", "\ud800", "\u202e", "<|im_end|>", "<s>", "{{ 7 * 7 }}", "../../etc/passwd", "a" * 3000, "😀" * 50, [], {},
    [[]], [{}], [None], ["red"] * 3, ["red"] * 70, [""], ["\udfff"], {"a": 1}, {"type": "text"}, [1, 2, 3], "1", "null",
]  # fmt: skip


def mutated(number: int) -> tuple[str, bytes]:
    """Path and body of a request with a few faults."""
    draw = random.Random(number)
    path, good = draw.choice(GOOD)
    body: Any = copy.deepcopy(good)
    for _ in range(draw.randint(1, 3)):
        _change(body, draw)
    text = json.dumps(body)
    kind = draw.random()
    if kind < 0.05:
        text = text[: draw.randrange(len(text))]
    elif kind < 0.1:
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice(["NaN", "Infinity", "\x00", '"', "{", "]", "é", "1e999", "//"]) + text[at:]
    return path, text.encode("utf-8", "surrogatepass")


def _change(body: Any, draw: random.Random) -> None:
    """Change one value somewhere in ``body``."""
    place = body
    while True:
        keys: list[Any] = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.6:
            place = place[key]
            continue
        act = draw.random()
        if act < 0.7:
            place[key] = copy.deepcopy(draw.choice(ODD))
        elif act < 0.8:
            del place[key]
        elif isinstance(place, dict):
            place[draw.choice(["promt", "\ud800", "", "model", "stream", "labels", "echo", "user"])] = draw.choice(ODD)
        else:
            place *= 2
        break
