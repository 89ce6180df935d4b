"""``.gitignore`` files as git reads them: which entries of a folder they exclude.

A rule is asked about one entry at a time, on the way down: whoever does not enter an excluded folder has git's rule that
nothing below it can be included again. The tests compare with git itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FILE = ".gitignore"
CLASSES = {
    "alnum": "a-zA-Z0-9", "alpha": "a-zA-Z", "digit": "0-9", "lower": "a-z", "upper": "A-Z", "space": r"\s",
    "xdigit": "0-9a-fA-F",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """One line."""

    pattern: re.Pattern[str]
    excludes: bool
    """False behind ``!``."""
    only_folders: bool
    whole_path: bool
    """Matched against the path below its file's folder; else against the last name alone."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The lines of one file, last first."""

    below: str
    """The folder that the file is in, with a slash behind it, or nothing for the root."""
    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, folder: Path, below: str) -> Rules | None:
        """What ``folder`` has to say; None where it says nothing."""
        file = folder / FILE
        if not file.is_file():
            return None
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return cls(below, tuple(rule for line in reversed(lines) if (rule := _rule(line))))

    def excludes(self, path: str, folder: bool) -> bool | None:
        """Of an entry below the same root as ``below``; None where no rule speaks of it."""
        inside, name = path.removeprefix(self.below), path.rpartition("/")[2]
        for rule in self.rules:
            if (folder or not rule.only_folders) and rule.pattern.fullmatch(inside if rule.whole_path else name):
                return rule.excludes
        return None


def excluded(path: str, folder: bool, files: list[Rules]) -> bool:
    """``files`` from the root down: the innermost one that speaks of the entry is right."""
    for rules in reversed(files):
        excluded = rules.excludes(path, folder)
        if excluded is not None:
            return excluded
    return False


def _rule(line: str) -> Rule | None:
    line = re.sub(r"(?<!\\) +$", "", line)
    if not line or line.startswith("#"):
        return None
    excludes = not line.startswith("!")
    line = line[not excludes :]
    only_folders = line.endswith("/")
    line = line.removesuffix("/")
    whole_path = "/" in line
    pattern = _regex(line.removeprefix("/"), whole_path)
    return Rule(re.compile(pattern, re.DOTALL), excludes, only_folders, whole_path) if pattern else None


def _regex(glob: str, whole_path: bool) -> str | None:
    """None where git's matcher gives up: a bracket that never closes, or nothing at all."""
    out, at = "", 0
    while at < len(glob):
        char, rest = glob[at], glob[at:]
        starts_part = at == 0 or glob[at - 1] == "/"
        if whole_path and starts_part and rest.startswith("**/"):
            out, at = out + "(?:.*/)?", at + 3
        elif whole_path and starts_part and rest == "**":
            out, at = out + ".+", at + 2
        elif char == "*":
            out, at = out + "[^/]*", at + len(rest) - len(rest.lstrip("*"))
        elif char == "?":
            out, at = out + "[^/]", at + 1
        elif char == "[":
            found = re.match(r"\[([!^]?)(\]?(?:\[:[a-z]+:\]|\\.|[^\]\\])*)\]", rest, re.DOTALL)
            if not found:
                return None
            inner = re.sub(r"\[:([a-z]+):\]", lambda m: CLASSES.get(m[1], ""), _escaped(found[2]))
            out, at = out + f"(?!/)[{'^' * bool(found[1])}{inner}]", at + len(found[0])
        elif char == "\\":
            if len(rest) < 2:
                return None
            out, at = out + re.escape(rest[1]), at + 2
        else:
            out, at = out + re.escape(char), at + 1
    return out or None


def _escaped(inner: str) -> str:
    """The inside of a bracket with what means something to ``re`` alone made plain."""
    return re.sub(r"^\]|\[(?!:)|&&|\|\||~~|\^", lambda m: "".join(f"\\{c}" for c in m[0]), inner)
