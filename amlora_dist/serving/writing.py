"""An answer that is being written, whichever engine draws its tokens: what each next token means to its client."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from amlora_dist.serving.detokenizer import Detokenizer
from amlora_dist.serving.jobs import Ended, Event, Failed, Job, Piece
from amlora_dist.serving.token_scores import TokenScore


@dataclass(eq=False, slots=True)
class AnswerRow:
    """A job whose answer is being written."""

    job: Job
    detokenizer: Detokenizer
    limit: int
    """Of its tokens: its caller's, else that of the task which the text was routed to; at most what the server allows."""
    generator: torch.Generator | None = None
    """What draws its tokens; None where the most likely one is taken, or another engine draws."""
    scores: list[TokenScore] = field(default_factory=list)
    """Of what was written, where the request asks for them."""
    sent: int = 0
    """How many of them went out with pieces."""

    @staticmethod
    def of(job: Job) -> AnswerRow:
        """A row without a word yet, of a text that was routed."""
        assert job.sampling is not None
        limit = min(job.sampling.new_tokens, job.bank.limit_of(job.request))
        return AnswerRow(job, Detokenizer(job.bank.decode, job.sampling.stops, live=job.stream), limit)

    def take(self, token: int) -> Event | None:
        """Its next token: tells the job of the text that it makes certain, and returns the job's last event, or None
        where it goes on."""
        job, detokenizer = self.job, self.detokenizer
        if (error := job.over()) is not None:
            return Failed(error)
        ended = token == job.bank.eos_id
        count = len(detokenizer.tokens) + (not ended)
        piece = "" if ended else detokenizer.grow(token)
        ended = ended or detokenizer.stopped
        full = count == self.limit
        if ended or full:
            piece += detokenizer.finish()
        fresh = tuple(self.scores[self.sent :])
        if job.stream and (piece or (fresh and (ended or full))):
            job.tell(Piece(piece, fresh))
            self.sent = len(self.scores)
        if ended or full:
            return Ended(detokenizer.text, "stop" if ended else "length", count, tuple(self.scores))
        return None
