"""Limits of a server. Imports nothing heavy."""

from __future__ import annotations

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

MOST_TEXTS = 4096
"""Texts of one request that ``max_texts`` may allow: counted before anything else is looked at."""


@dataclass(config=ConfigDict(extra="forbid"), kw_only=True, frozen=True, slots=True)
class ServeSettings:
    """What one replica takes in and how it batches; the command line has an option for each."""

    max_body_bytes: int = Field(default=1_048_576, ge=1024)
    """Of a request's body; more is answered with 413."""
    max_prompt_characters: int = Field(default=32_768, ge=1)
    """Of one text with its question; more is answered with 400."""
    max_new_tokens: int = Field(default=512, ge=1)
    """A request that asks for more is answered with 400."""
    max_texts: int = Field(default=64, ge=1, le=MOST_TEXTS)
    """Texts of one request."""
    max_concurrency: int = Field(default=256, ge=1)
    """Texts in the server at once, waiting ones too; more are answered with 429."""
    request_timeout_s: float = Field(default=120.0, gt=0)
    """From the request's arrival to its end; then 504, or an error event in a stream."""
    read_timeout_s: float = Field(default=20.0, gt=0)
    """For a request's head to come, and for its body; then the connection is closed, after 408 where it was the body."""
    batch_rows: int = Field(default=32, ge=1)
    """Rows of one pass."""
    prefill_tokens: int = Field(default=4096, ge=1)
    """Prompt tokens, padding included, of one pass: bounds how long running streams wait for newcomers."""
    poll_s: float = Field(default=10.0, gt=0)
    """Between two looks at the alias."""
