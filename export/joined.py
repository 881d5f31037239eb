"""Two tensors of a checkpoint as one, by rows: nothing is copied but the rows that are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from vlm_edge.export.checkpoint import TensorRef, Weights


@dataclass(frozen=True, kw_only=True)
class JoinedRows(Weights):
    """A linear layer or a table whose `weight` goes on in another tensor (IDEFICS's additional vocabulary).

    Attributes:
        more: whose `weight` the last rows are.
        rows: how many they are.
    """

    more: Weights
    rows: int

    def tensor(self, name: str, *shape: int) -> TensorRef:
        first, *rest = shape
        refs = (
            super().tensor(name, first - self.rows, *rest),
            self.more.tensor(name, self.rows, *rest),
        )
        # `TensorRef` asks no more of its array than _Joined has.
        return TensorRef(refs[0].name, cast(np.ndarray, _Joined([ref.view for ref in refs])))


@dataclass(frozen=True)
class _Joined:
    """As much of an array [rows, columns] as `TensorRef` and its readers use.

    Attributes:
        arrays: memory-mapped.
        axis: the one they are joined along: 0, or 1 where they are transposed.
    """

    arrays: Sequence[np.ndarray]
    axis: int = 0

    @property
    def dtype(self) -> np.dtype:
        first, *others = {array.dtype for array in self.arrays}
        return np.dtype(np.float32) if others else first

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.arrays[0].shape)
        shape[self.axis] = sum(array.shape[self.axis] for array in self.arrays)
        return tuple(shape)

    @property
    def T(self) -> _Joined:
        return _Joined([array.T for array in self.arrays], 1 - self.axis)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """Rows: a slice in steps of 1, or int64 numbers of any shape where `axis` is 0."""
        if not isinstance(rows, slice):
            found, first = np.empty((*np.shape(rows), *self.shape[1:]), self.dtype), 0
            for array in self.arrays:
                here = (rows >= first) & (rows < first + len(array))
                found[here] = array[rows[here] - first]
                first += len(array)
            return found
        start, stop, _ = rows.indices(self.shape[0])
        pieces, first = list[np.ndarray](), 0
        for array in self.arrays:
            pieces.append(array[max(0, start - first) : max(0, stop - first)].astype(self.dtype))
            first += len(array) if self.axis == 0 else 0
        return np.concatenate(pieces, axis=self.axis)
