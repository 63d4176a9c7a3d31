"""Arrays whose rows are made when they are read, so that a dataset of files is written without being in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

OPAQUE = 255


@dataclass(frozen=True)
class Rows:
    """A uint8 array for `DatasetWriter`. ``row(i)`` makes row i, in a thread of ``pool``."""

    shape: tuple[int, ...]
    pool: ThreadPoolExecutor
    row: Callable[[int], np.ndarray]
    dtype = np.dtype(np.uint8)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return np.stack(list(self.pool.map(self.row, range(*rows.indices(self.shape[0])))))
