"""All tasks at once in one stage: the upper bound of not having to learn in sequence."""

from __future__ import annotations

from amlora_dist.methods.base import Baseline
from amlora_dist.methods.kinds import Stages


class Joint(Baseline):
    """One adapter trained on the rows of all tasks, shuffled together; it is not told the task.

    There is one stage, so the accuracy matrix has one row, over all tasks, and no transfer or forgetting is defined.
    It makes as many steps as all stages of a sequence together.
    """

    stages = Stages.ONE
