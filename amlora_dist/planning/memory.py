"""Bytes on one GPU, and on the host that feeds it, while a stage trains under ZeRO. Every line can be done by hand.

Letters: P parameters of the base model, t of what trains, W ranks, s bytes of an element (2 in bf16, 4 in fp32).
The base model and all earlier adapters are frozen: they have no gradients and no optimizer state, whatever the stage.

====== ======================== ========================= ==========================
ZeRO   weights                  gradients                 optimizer state
====== ======================== ========================= ==========================
0      s (P + bank + t)         4 t (6 t in bf16)         12 t (8 t in fp32)
1, 2   the same                 4 t / W                   12 t / W
3      s x sum of ceil(p / W)   8 t / W (6 t / W in bf16) 12 t / W (8 t / W in fp32)
====== ======================== ========================= ==========================

Under ``model.quantisation``, which ZeRO-3 does without, the linear layers of P take 0.5625 (nf4) or 1 byte an element.

What DeepSpeed 0.19 holds was read from its source and is measured against these lines by
``benchmarks/zero_memory.py``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from amlora_dist.adapters.targets import in_attention

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from amlora_dist.planning.shapes import Shape

GIB = 1 << 30
RESERVED = 2 * GIB
"""Bytes of a GPU that are not ours: CUDA's context, NCCL's buffers, library handles. An assumption, not measured here."""
FRAGMENTATION = 0.05
"""Share of the planned bytes that the allocator loses. An assumption."""
PROCESS = 300 << 20
"""Bytes of one worker on CPUs that has imported torch and done nothing."""
BUCKET = 500_000_000
LIVE = 1_000_000_000
PERSISTENT = 100_000
SWAP_BUFFERS = 5 * 100_000_000
"""DeepSpeed's defaults, in elements: reduce bucket, gathered parameters kept, never partitioned; on the host on the way to
and from NVMe."""

Offload = Literal["none", "optimizer", "parameters", "both", "nvme"]
"""What leaves the GPU: the optimizer's state to the host (ZeRO 1 to 3), the weights to the host (ZeRO-3), both, or the
weights to the node's NVMe disk (ZeRO-3)."""


@dataclass(frozen=True, slots=True)
class MemoryLayout:
    """How a stage is spread and cut: what a user can change to make it fit."""

    zero: int
    ranks: int
    offload: Offload = "none"
    checkpointing: bool = False
    micro_batch: int = 1
    """Examples of one forward pass of one rank."""
    bucket: int = BUCKET
    live: int = LIVE
    overlap: bool | None = None
    persistent: int = PERSISTENT
    """The four from ``deepspeed.zero_optimization``; see the constants above."""

    @classmethod
    def of(
        cls, section: Mapping[str, Any], *, zero: int, ranks: int, micro_batch: int, checkpointing: bool
    ) -> MemoryLayout:
        """From a run's ``deepspeed:`` section."""
        given = section.get("zero_optimization", {})

        def number(name: str, default: int) -> int:
            value = given.get(name, given.get(f"stage3_{name}", default))
            return default if value == "auto" else int(value)

        optimizer, parameters = _device(given, "offload_optimizer"), _device(given, "offload_param")
        offload: Offload = "none" if optimizer == "none" or zero == 0 else "optimizer"
        if parameters != "none" and zero == 3:
            offload = "both" if offload == "optimizer" else "parameters"
            offload = "nvme" if parameters == "nvme" else offload
        return cls(
            zero=zero,
            ranks=ranks,
            offload=offload,
            checkpointing=checkpointing,
            micro_batch=micro_batch,
            bucket=number("reduce_bucket_size", BUCKET),
            live=number("max_live_parameters", LIVE),
            overlap=given.get("overlap_comm"),
            persistent=number("param_persistence_threshold", PERSISTENT),
        )

    def with_zero(self, zero: int, offload: Offload = "none") -> MemoryLayout:
        return replace(self, zero=zero, offload=offload)


def _device(section: Mapping[str, Any], name: str) -> str:
    return str((section.get(name) or {}).get("device", "none"))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    """DeepSpeed's reduce bucket, and under ZeRO-3 the layers that are gathered at one time."""
    host: int
    """Bytes that offloading keeps on the host for this rank."""
    loading: int
    """Most bytes on the host while this rank loads the base model."""
    nvme: int = 0
    """Bytes that this rank keeps on its node's disk."""
    reader: int = 0
    """Bytes that one rank of the cluster holds besides while it loads: for NVMe transformers reads, all of it on rank 0."""

    @property
    def gpu(self) -> int:
        """What must fit on the GPU, with what is not ours."""
        return round(self._ours * (1 + FRAGMENTATION)) + RESERVED

    @property
    def worker(self) -> int:
        """What a worker on CPUs holds at its worst moment, of training or of loading, with its process."""
        return round(max(self._ours, self.loading) * (1 + FRAGMENTATION)) + PROCESS

    @property
    def _ours(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers


@dataclass(frozen=True, slots=True)
class TrainedShare:
    """What stage n trains, and what it is trained on top of. Counts are elements."""

    new: int
    """The new adapter and its recipe."""
    old: int
    """The frozen adapters of earlier stages."""


def memory_of(
    shape: Shape, trained: TrainedShare, layout: MemoryLayout, *, size: int, length: int, targets: int, eager: bool
) -> Memory:
    """What one rank holds at its worst moment of a training step.

    Args:
        shape: of the base model.
        trained: the stage.
        layout: ZeRO stage, ranks, offload, micro-batch.
        size: bytes of an element of the model.
        length: tokens of a row, answer included.
        targets: answer tokens of a row.
        eager: attention keeps its scores (``model.attention: eager``).
    """
    t, w, zero = trained.new, layout.ranks, layout.zero
    whole = shape.weight_bytes(size) + size * (trained.old + t)
    part = size * (sum(-(-count // w) for count in shape.tensors) + -(-(trained.old + t) // w))
    small = size * sum(count for count in shape.tensors if count <= layout.persistent)
    weights = whole if zero < 3 else part
    optimizer = _optimizer(t, w, zero, size)
    gradients = _gradients(t, w, zero, size)
    buffers = 0
    if zero == 3:
        gathered = min(shape.parameters, layout.live + shape.largest_tensor)
        buffers = size * gathered + small
    if zero > 0:
        staged = size * layout.bucket
        buffers += staged * (2 if layout.overlap and zero < 3 else 1)
    host = nvme = 0
    if layout.offload in ("optimizer", "both") and zero > 0:
        host += (12 + 4) * -(-t // w)  # masters, moments, and the fp32 gradients that the host's step reads
        optimizer = 0
    if layout.offload in ("parameters", "both") and zero == 3:
        host += weights
        weights = 0
    if layout.offload == "nvme" and zero == 3:
        host += size * SWAP_BUFFERS
        nvme, weights = weights, 0
    loading = whole if zero < 3 else part + size * shape.largest_layer
    if shape.quantisation != "none":
        loading += size * shape.largest_tensor  # is quantised as it comes
    ranks = (trained.new + trained.old) // shape.adapter_width
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations(
            shape, layout, size=size, length=length, targets=targets, eager=eager, ranks=ranks
        ),
        buffers=buffers,
        host=host,
        loading=loading,
        nvme=nvme,
        reader=whole if nvme else 0,
    )


def _gradients(t: int, w: int, zero: int, size: int) -> int:
    """At the step, when the optimizer reads them in fp32."""
    if zero == 0:
        return 4 * t + (size * t if size < 4 else 0)
    kept = size if zero == 3 else 0  # ZeRO-3 flattens its partition, in the model's dtype, into a copy of its own
    return (4 + kept) * -(-t // w)


def _optimizer(t: int, w: int, zero: int, size: int) -> int:
    """fp32 master weights and Adam's two moments; an fp32 model is its own master without ZeRO. Under ZeRO-3 DeepSpeed
    (0.19) means it to be, but compares a device with a device's name, which never agree: measured, a copy of its own."""
    if zero == 0:
        return (8 if size == 4 else 12) * t
    return 12 * -(-t // w)


OUTPUT = re.compile(r"attn.*\.(o_proj|out_proj|c_proj|dense)$|attention.*\.(o|dense|out_proj)$", re.IGNORECASE)
"""Paths of the linear layers that read what attention made."""


def activations(
    shape: Shape, layout: MemoryLayout, *, size: int, length: int, targets: int, eager: bool, ranks: int = 0
) -> int:
    """Bytes that autograd keeps from forward to backward, for one micro-batch.

    Only layers at or above the first adapted one keep anything: below it nothing needs a gradient. Frozen linear layers
    keep no input either, for their weights have no gradient. What one token leaves in a layer: the input of both
    norms in fp32 (2 x 4 h); a norm's output where adapters read it (s h each); queries and attention's output (2 s a),
    keys and values (2 s k); gate before and after its function, and up (3 s f), and their product where an adapter reads
    it (s f). Eager attention adds its scores, (4 + s) per head and token of the row, or 4 in fp32, and its output in
    another order where an adapter reads that (s a). Every adapted layer keeps A x, s for each of the ``ranks`` (summed
    over the adapters that lie side by side). With checkpointing a layer keeps its input (s h) and one layer at a time
    the rest.
    """
    tokens = layout.micro_batch * length
    reads = {(in_attention(target.path), target.out_features == shape.hidden) for target in shape.targets}
    attention = 4 * shape.hidden + size * (2 * shape.attention_width + 2 * shape.key_value_width)
    attention += size * shape.hidden * any(inside for inside, _ in reads)
    if eager:
        attention += shape.heads * length * (4 if size == 4 else 4 + size)
        attention += size * shape.attention_width * any(OUTPUT.search(target.path) is not None for target in shape.targets)
    rest = 4 * shape.hidden + size * 3 * shape.intermediate
    rest += size * (shape.hidden * ((False, False) in reads) + shape.intermediate * ((False, True) in reads))
    layers, attentions = shape.training_layers, shape.training_attentions
    adapted = size * ranks * len(shape.targets)
    if layout.checkpointing:
        kept = layers * size * shape.hidden + attention + rest + adapted // max(1, layers)
    else:
        kept = attentions * attention + layers * rest + adapted
    # Logits at the answers only: as computed, in fp32, their log-softmax, and the gradients of the first two.
    logits = layout.micro_batch * (targets + 1) * shape.vocabulary * (2 * size + 12)
    return tokens * kept + logits


def activation_table(
    shape: Shape, layout: MemoryLayout, *, size: int, lengths: Sequence[int], targets: int, eager: bool, ranks: int = 0
) -> list[dict[str, int]]:
    """Bytes of activations by rows of a micro-batch and tokens of a row, without and with checkpointing."""
    micros = sorted({1, 2, 4, 8, layout.micro_batch})
    return [
        {"micro_batch": micro, "length": length}
        | {
            name: activations(
                shape, replace(layout, micro_batch=micro, checkpointing=keep), size=size, length=length,
                targets=min(targets, length), eager=eager, ranks=ranks,
            )
            for name, keep in (("without", False), ("with_checkpointing", True))
        }
        for micro in micros
        for length in lengths
    ]  # fmt: skip
