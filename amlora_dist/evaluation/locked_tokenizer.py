"""A tokenizer of the ``tokenizers`` library for several threads."""

from __future__ import annotations

import threading
from typing import Any


class LockedTokenizer:
    """A tokenizer whose calls wait for each other.

    Args:
        tokenizer: which may change its own settings in a call.
        lock: held during each call; others who use the tokenizer hold it too.
    """

    def __init__(self, tokenizer: Any, lock: threading.Lock) -> None:
        self._tokenizer, self._lock = tokenizer, lock

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._lock:
            return self._tokenizer(*args, **options)

    def tokenize(self, text: str) -> Any:
        """See the tokenizer's."""
        with self._lock:
            return self._tokenizer.tokenize(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
