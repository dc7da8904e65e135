"""Moments: how many values there are, their mean, and how far they are from it; mergeable."""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Statistics of the values of each of C channels.

    Attributes:
        count: values per channel.
        mean: (C,); zeros when there are no values.
        m2: (C,), sums of squared deviations from `mean`; never negative.
    """

    count: int
    mean: Array
    m2: Array


def merge(counts: Array, means: Array, m2s: Array) -> Moments:
    """Return the moments of all values from those of n parts, some of them empty perhaps.

    Sums of squares are never subtracted: nothing cancels, however far the values are from zero.

    Args:
        counts: (n,), of the dtype of the others.
        means: (n, C).
        m2s: (n, C).

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
    Sample Variances", 1979, equations 2.1; for n parts at once instead of two.
    """
    total = counts.sum()
    count = int(total)
    shares = (counts / max(count, 1))[:, None]
    mean = (shares * means).sum(axis=0)
    apart = means - mean
    m2 = m2s.sum(axis=0) + (counts[:, None] * apart * apart).sum(axis=0)
    return Moments(count=count, mean=mean, m2=m2)
