"""What travels and what stays at home: addresses without their secrets, configurations without anybody's paths.

A bank, a run's configuration and its results are read by people who have no business with the store they came from: they
hold no address of a store, no user, password or query, and no absolute path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

DROPPED = ("mlflow", "storage", "data_dir", "tracking")
"""Sections and keys of a configuration that say where things lie; they change no result."""
_TEXTS = {"prompt", "labels", "question", "template", "description", "text"}
"""Keys whose values are texts, whatever they begin with."""
_INSIDE = r"(?:[^\s'\"<>]|['\"<>](?![,:;.)}\]\s]|$))"
"""Of an address in a text: a quote or bracket that does not end it may be a password's."""
_USER = re.compile(rf"\b(?!sqlite)([A-Za-z][A-Za-z0-9+.-]*://){_INSIDE}*@")
_QUERY = re.compile(
    rf"(\bsqlite[^:\s]*:///[^?\n'\"]*(?=\?)|\b(?!sqlite)[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>?#]*)[?#](?:(?!\)|[,;](?:\s|$)){_INSIDE})*"
)
"""A file's name may hold spaces and signs, a host's may not."""
_ADDRESS = re.compile(r"\s*(?!sqlite)([A-Za-z][A-Za-z0-9+.:-]*://)(.*)", re.DOTALL)
_LOCAL = re.compile(r"(file|sqlite[^:/]*|dbfs):[/\\]", re.IGNORECASE)
"""Addresses of this machine's files, whose way is as private as a path's."""
_ABSOLUTE = re.compile(r"[/~]|\\\\|[A-Za-z]:[\\/]")


def shown(text: str, *secrets: str) -> str:
    """A text without the users, passwords and queries of the addresses in it, nor any of these ``secrets``."""
    for secret in secrets:
        text = text.replace(secret, "***")
    if "://" not in text:
        return text
    if "@" in text:
        text = _USER.sub(r"\1", text)
    return _QUERY.sub(r"\1", text) if "?" in text or "#" in text else text


def secrets_of(uri: str) -> list[str]:
    """What must not be seen of an address, in each spelling, the longest first."""
    found: set[str] = set()
    rest = uri.partition("://")[2]
    if "@" in rest and not uri.startswith("sqlite"):
        user, _, password = rest.rpartition("@")[0].partition(":")
        found |= {password} if password else {user}  # a token is alone, before the host
    for pair in re.split("[?&#]", rest)[1:]:
        key, _, value = pair.partition("=")
        if re.search(r"pass|pwd|token|secret|key|credential", key, re.IGNORECASE):
            found.add(value)
    found |= {unquote(secret) for secret in found}
    return sorted((secret for secret in found if len(secret) > 3), key=len, reverse=True)


def public_name(source: str) -> str:
    """What may be shown of a model, a file or an address: all of a Hub id or a relative path, the last part of an absolute
    one."""
    source = source.strip()
    if _LOCAL.match(source):
        source = "/" + re.split("[?#]", source.partition(":")[2])[0]
    if (address := _ADDRESS.match(source)) is not None:  # all of it is one, whatever signs a password has
        return address[1] + re.split("[?#]", address[2].rpartition("@")[2])[0]
    if "://" in source:
        return shown(source)
    if _ABSOLUTE.match(source) or ".." in re.split(r"[\\/]", source):
        return re.split(r"[\\/]", source.rstrip("\\/"))[-1] or "folder"
    return source


def public_configuration(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved configuration as it may be published: without ``DROPPED``, every path as ``public_name`` says it."""
    return {key: _public(value, key) for key, value in mapping.items() if key not in DROPPED}


def _public(value: Any, key: str) -> Any:
    if key in _TEXTS:
        return value
    if isinstance(value, Mapping):
        return {inner: _public(one, str(inner)) for inner, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_public(one, key) for one in value]
    return public_name(value) if isinstance(value, str) else value
