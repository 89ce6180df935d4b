"""TCP ports for the servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

# Above those that Ray gives its workers, below those that Linux lends to outgoing connections: either could take a port
# between our looking and the server's binding. Each process of pytest-xdist has a part for itself.
_FIRST, _PART, _PARTS = 20_000, 1_500, 8
_part = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PARTS
_offsets = itertools.cycle((os.getpid() + step) % _PART for step in range(_PART))


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens; the same again only after 1,500 others."""
    for offset in itertools.islice(_offsets, _PART):
        port = _FIRST + _part * _PART + offset
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"no free port from {_FIRST + _part * _PART} on")
