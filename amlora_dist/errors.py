"""What can go wrong, by whom it can be fixed; the command line maps each class to its exit code."""

from __future__ import annotations

import errno
import re
import unicodedata
from dataclasses import dataclass


class AmloraError(Exception):
    """Base of every error this project raises on purpose; the message is meant to be read by a person."""

    exit_code = 1


class UserError(AmloraError):
    """Something the caller can fix: a file, a key, a value. The message names all three and the fix."""

    exit_code = 2


class HeldError(AmloraError):
    """Another driver holds the run id (or the fingerprint)."""

    exit_code = 3


class TrainingError(AmloraError):
    """A stage failed for good, after the retries its failure policy allows."""

    exit_code = 4


class NotPromotedError(AmloraError):
    """A version did not pass what was required of it; the alias stays where it is."""

    exit_code = 5


class BankError(UserError):
    """A bank, checkpoint or manifest is damaged, hostile, or of a schema this code does not know."""


class LeaseLostError(AmloraError):
    """This driver was paused or cut off and another one took its run; nothing it writes counts any more."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong in a file.

    ``where`` is the path of the key inside the file (``training.epochs``), ``found`` what is there,
    ``expected`` what should, ``hint`` the fix ("did you mean ...").
    """

    where: str
    found: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        text = f"{self.where}: found {self.found}, expected {self.expected}"
        return f"{text} ({self.hint})" if self.hint else text


class FoundFault(Fault):
    """A fault in the words of the check that found it: ``found`` is all that its message says behind the key."""

    def __str__(self) -> str:
        text = f"{self.where}: {self.found}"
        return f"{text} ({self.hint})" if self.hint else text

    @classmethod
    def of(cls, error: UserError, where: str) -> FoundFault:
        """Of an error whose message may begin with its key; without one it is about ``where``."""
        key, colon, rest = str(error).partition(": ")
        known = bool(colon) and re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", key) is not None
        return cls(key if known else where, rest if known else str(error).removeprefix(f"{where}: "), "")


MOST_SHOWN = 200
"""Faults of one file."""


class FaultsError(UserError):
    """Every fault found in one file, at once."""

    def __init__(self, file: str, faults: list[Fault]) -> None:
        self.file, self.faults = file, faults
        lines = "\n".join(f"  - {fault}" for fault in faults[:MOST_SHOWN])
        if len(faults) > MOST_SHOWN:
            lines += f"\n  - and {len(faults) - MOST_SHOWN} more"
        super().__init__(f"{file}: {len(faults)} fault{'s' if len(faults) != 1 else ''}\n{lines}")


_FULL_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS = (
    "database or disk is full", "disk I/O error", "No space left on device", "File too large", "Disk quota exceeded",
)  # fmt: skip


def is_full(error: Exception) -> bool:
    """Whether an error of the system, of SQLite or of what lies between says that a disk has no room (or a quota)."""
    return getattr(error, "errno", None) in _FULL_NUMBERS or any(words in str(error) for words in _FULL_WORDS)


def no_room(error: Exception) -> str | None:
    """What a person can do about a file that a disk does not take: full, read-only, or somebody else's; None for any other
    error."""
    place = getattr(error, "filename", None)
    where = f"{place}: " if isinstance(place, str) else ""
    if is_full(error):
        return f"{where}the disk is full, or a quota is used up; make room, then start the same command again"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
        return f"{where}cannot be used ({plain_reason(error)}); fix the permissions, or name another place"
    return None


def visible(text: str) -> str:
    """A text as a terminal may have it: what would move the cursor, change colours or turn the direction of writing is
    shown as an escape. Names and cells of files that somebody else wrote come into messages."""
    moving = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(one if one == "\n" or unicodedata.category(one) not in moving else ascii(one)[1:-1] for one in text)


def plain_reason(error: BaseException) -> str:
    """Why, without numbers and the names of classes: ``connection refused`` for ``<urlopen error [Errno 111] ...>``."""
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):
        return plain_reason(inner)
    text = getattr(error, "strerror", None) or (inner if isinstance(inner, str) else "") or str(error)
    return str(text[:1].lower() + text[1:])
