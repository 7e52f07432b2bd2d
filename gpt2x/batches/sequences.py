"""Sequences of token ids, and what of them is learned."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORED = -100


class Sequences(NamedTuple):
    """B sequences of T tokens."""

    ids: np.ndarray
    """Token ids, (B, T) int64."""
    labels: np.ndarray | None = None
    """The same ids where they are learned and IGNORED elsewhere, (B, T) int64, unshifted; None where all of them
    are learned."""
    position_ids: np.ndarray | None = None
    """(B, T) int64, beginning again at every document; None where documents are not told apart."""


def joined(parts: Sequence[tuple[np.ndarray, Sequences]]) -> Sequences:
    """The sequences of several sources as those of one; what a part lacks is filled in.

    Args:
        parts: for each, at which rows its sequences go, (n,) integers, ascending and together 0..B-1.
    """
    if len(parts) == 1:
        return parts[0][1]
    shape = sum(len(rows) for rows, _ in parts), parts[0][1].ids.shape[1]
    has_labels = any(part.labels is not None for _, part in parts)
    has_positions = any(part.position_ids is not None for _, part in parts)
    ids_BT = np.empty(shape, np.int64)
    labels_BT = np.empty(shape, np.int64) if has_labels else None
    positions_BT = np.empty(shape, np.int64) if has_positions else None
    for rows, part in parts:
        ids_BT[rows] = part.ids
        if labels_BT is not None:
            labels_BT[rows] = part.ids if part.labels is None else part.labels
        if positions_BT is not None:
            positions_BT[rows] = np.arange(shape[1]) if part.position_ids is None else part.position_ids
    return Sequences(ids_BT, labels_BT, positions_BT)
