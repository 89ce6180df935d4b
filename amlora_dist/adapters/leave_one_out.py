"""What keys would say of rows that they were made of, had each of these rows not been there.

A row f that counts in the mean mu of n rows of its own key, and in the covariance of N rows, differs from that mean by
u = f - mu. Without it the mean is mu - u / (n - 1), and the scatter S - n / (n - 1) u u^T. With

    Sigma  = ((1 - eps) S + eps D) / N                                     as ``statistics.Covariance`` has it
    Sigma' = ((1 - eps) (S - n / (n - 1) u u^T) + eps D) / (N - 1)         without the row

where **D, what the scatter is shrunk to (its diagonal, or its mean diagonal), is held fixed**, Sigma' is a multiple of Sigma
less a matrix of rank one, and the formula of Sherman and Morrison (1950) gives its inverse in closed form:

    Sigma'^-1 = (N - 1) / N (Sigma^-1 + h a a^T),    a = Sigma^-1 u,    g = (1 - eps) / N n / (n - 1),    h = g / (1 - g u.a)

So the scores of all keys for the row, mu_j . Sigma'^-1 f - 1/2 mu_j . Sigma'^-1 mu_j with its own key's mean moved, follow
from one more solve for each row, and nothing is fitted again: leave-one-out of discriminant analysis (Lachenbruch and Mickey
1968), here with a shrunk covariance. Exact but for D; the row's own share of D is about 1/N of it.

**The only row of its label** cannot be left out: without it the label has no mean, and so no key. ``leave_out`` passes over
such rows, and over those without which Sigma' is singular (with eps 0 alone): they have no score.

Shapes: n rows, d features, J keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from amlora_dist.adapters.statistics import Covariance

SINGULAR = 1e-9
"""1 - g u.a from which on something is left of Sigma' along u."""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows, each left out of what it counts in, fp64; made by ``leave_out``."""

    places: Tensor
    """Of the rows that could be left out, among those that were given, (n,) int64."""
    rows_nD: Tensor
    means_nD: Tensor
    """Of each row's own key, the row counted."""
    share_n: Tensor
    """1 / (n - 1): without the row its key's mean is mu - share u."""
    distance_n: Tensor
    """u . a"""
    reach_n: Tensor
    """f . a"""
    gain_n: Tensor
    """h"""
    scaled: float
    """(N - 1) / N"""

    def scores(self, weights_JD: Tensor, bias_J: Tensor, own_n: Tensor | None = None) -> Tensor:
        """Of every key for every row, the row left out, (n, J): what ``RouterKeys.scores`` gives at temperature 1.

        Args:
            weights_JD: Sigma^-1 mu_j, the rows counted.
            bias_J: -1/2 mu_j . Sigma^-1 mu_j.
            own_n: which of the keys is each row's own; None where no row counts in their means (a background's).
        """
        row_nJ = self.rows_nD @ weights_JD.T
        apart_nJ = row_nJ - self.means_nD @ weights_JD.T
        power_nJ = (-2 * bias_J).expand_as(row_nJ)
        share, distance, reach, gain = (x[:, None] for x in (self.share_n, self.distance_n, self.reach_n, self.gain_n))
        if own_n is not None:
            own = own_n[:, None]
            power_nJ = power_nJ.scatter_add(1, own, share * (share * distance - 2 * apart_nJ.gather(1, own)))
            row_nJ = row_nJ.scatter_add(1, own, -share * reach)
            apart_nJ = apart_nJ.scatter_add(1, own, -share * distance)
        return self.scaled * (row_nJ + gain * apart_nJ * reach - 0.5 * (power_nJ + gain * apart_nJ.square()))


def leave_out(rows_nD: Tensor, means_nD: Tensor, counts_n: Tensor, covariance: Covariance) -> LeftOut:
    """Leave each of some rows out of the mean of its key and out of the covariance.

    Args:
        rows_nD: of those that the covariance counts.
        means_nD: of each row's own key, around which the covariance has its scatter.
        counts_n: rows of that key.
        covariance: of the keys.
    """
    rows, counts = rows_nD.double(), counts_n.double()
    apart = rows - means_nD
    solved = covariance.solve(apart)
    distance, reach = (apart * solved).sum(dim=1), (rows * solved).sum(dim=1)
    share = 1 / (counts - 1).clamp(min=1)
    left = 1 - covariance.weight * counts * share * distance
    kept = ((counts > 1) & (left > SINGULAR)).nonzero()[:, 0]
    gain = covariance.weight * counts * share / left
    scaled = 1.0 if covariance.flat else (covariance.rows - 1) / covariance.rows
    return LeftOut(kept, rows[kept], means_nD[kept], share[kept], distance[kept], reach[kept], gain[kept], scaled)
