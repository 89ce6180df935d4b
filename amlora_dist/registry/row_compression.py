"""A task's row in fewer ranks: what a server takes that limits the rank of an adapter.

By the theorem of Eckart and Young (1936) the product of the largest singular triples is the closest matrix of a rank to
another in Frobenius norm. A row is ``B A`` with few columns in B, so that its singular values are those of a small matrix:
with ``B = Q_b R_b`` and ``A^T = Q_a R_a`` those of ``R_b R_a^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amlora_dist.adapters.adapter import Adapter


def compressed(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The closest adapter of a rank, at alpha / r = 1, and how far it is: the Frobenius norm of the difference over that of
    the whole, all layers together (0: the same function).

    Args:
        adapter: without a recipe.
        rank: of every layer of the result; one of fewer ranks is filled up with zeros.
    """
    a: dict[str, Tensor] = {}
    b: dict[str, Tensor] = {}
    lost = whole = 0.0
    for module, a_RI in adapter.a.items():
        q_OK, r_KR = torch.linalg.qr(adapter.b[module].double() * adapter.scale)
        p_IL, s_LR = torch.linalg.qr(a_RI.double().T)
        u, values, v = torch.linalg.svd(r_KR @ s_LR.T, full_matrices=False)
        retained = min(rank, len(values))
        root = values[:retained].sqrt()
        fill = rank - retained
        b[module] = torch.nn.functional.pad(q_OK @ u[:, :retained] * root, (0, fill)).float().contiguous()
        a[module] = torch.nn.functional.pad(root[:, None] * (v[:retained] @ p_IL.T), (0, 0, 0, fill)).float().contiguous()
        lost += float(values[retained:].square().sum())
        whole += float(values.square().sum())
    return Adapter(adapter.task, rank, float(rank), a, b), (lost / whole) ** 0.5 if whole else 0.0
