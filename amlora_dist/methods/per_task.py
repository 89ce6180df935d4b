"""One adapter for each task, told which task it is: the upper bound of learning each task alone."""

from __future__ import annotations

from amlora_dist.methods.base import Baseline
from amlora_dist.methods.kinds import Stages


class PerTask(Baseline):
    """Every stage starts from an empty bank, and a row is scored by the adapter of its own task.

    R[t,i] is the score of adapter i on task i for every i <= t, and undefined for tasks not yet learned: nothing is
    shared, so nothing is forgotten and nothing transfers. Each version that a run publishes holds its own stage's
    adapter only. Its last row is ``single`` of ``forward_transfer_single``.
    """

    stages = Stages.APART
