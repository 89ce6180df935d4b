"""Learning without forgetting: one LoRA trained on, asked to answer the new rows as it did before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from amlora_dist.methods.seq_lora import SeqLoRA

if TYPE_CHECKING:
    from amlora_dist.training.micro_batch import MicroBatch


class LwF(SeqLoRA):
    """``seq_lora`` with distillation from the model before the stage, on the new task's rows::

        loss = CE + lwf_weight * T^2 * KL(p_old(. / T) || p_new(. / T)), mean over target tokens

    with softmax temperature T = ``lwf_temperature``. The old model needs no second copy: it is the same base with the
    previous row of the bank, one more forward pass without gradient.

    Source: Li and Hoiem 2016; T^2 keeps the gradient's size (Hinton et al. 2015). Their old heads become the answers'
    distribution over the vocabulary at the positions of the new targets.
    """

    uses = ("lwf_weight", "lwf_temperature")

    def loss(self, batch: MicroBatch) -> Tensor:
        if batch.tasks < 2:
            return super().loss(batch)
        before = torch.zeros(batch.tasks)
        before[-2] = 1.0
        old = batch.answers(before, gradient=False)
        new = batch.answers(self.training_gate(batch.tasks))
        return batch.cross_entropy(new) + batch.sum_over_tokens(self.distillation(new.at_targets, old.at_targets))

    def distillation(self, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
        """The divergence, summed over target tokens."""
        s = self.settings.method_settings
        old, new = ((logits / s.lwf_temperature).log_softmax(dim=-1) for logits in (teacher_NV, student_NV))
        kl = F.kl_div(new, old, log_target=True, reduction="sum")
        return s.lwf_weight * s.lwf_temperature**2 * kl
