"""Sequences of tasks on a Ray cluster: the command line, the durable run, one stage, search, submission, serving.

``Sequence`` is a run from Python, ``RunResult`` what it gives (``pipelines.runs.api``).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.runs.api import RunResult, Sequence

__all__ = ["RunResult", "Sequence"]


def __getattr__(name: str) -> Any:
    """What a run needs is imported when it is first asked for."""
    if name in __all__:
        from pipelines.runs import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
