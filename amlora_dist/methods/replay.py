"""Experience replay: one LoRA trained on, with a few rows of every earlier task among the new ones."""

from __future__ import annotations

from collections.abc import Sequence

from amlora_dist.methods.seq_lora import SeqLoRA


class Replay(SeqLoRA):
    """``seq_lora`` whose stages also see at most ``replay_rows`` training rows of each earlier task.

    The rows are a uniform sample without replacement, which is what reservoir sampling keeps of a task (Vitter 1985);
    it is drawn from (seed, task), so every later stage sees the same rows. They are shuffled among the new rows, each
    once an epoch.

    Source: Chaudhry et al. 2019 ("On tiny episodic memories in continual learning", arXiv 1902.10486).
    """

    uses = ("replay_rows",)

    def rows(self, stage: str, earlier: Sequence[str], sequence: Sequence[str]) -> dict[str, int | None]:
        return {stage: None} | dict.fromkeys(earlier, self.settings.method_settings.replay_rows)
