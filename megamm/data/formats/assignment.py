"""The best one-to-one assignment, exactly (what `scipy.optimize.linear_sum_assignment` computes)."""

from __future__ import annotations

import numpy as np


def best_assignment(gain: np.ndarray) -> list[tuple[int, int]]:
    """Pairs (row, column), by row, each row and column at most once, as many as there can be, with the
    greatest sum of gains.

    By shortest augmenting paths (Jonker and Volgenant, Computing 38, 1987), of order rows^2 x columns
    with rows <= columns.

    Args:
        gain: [rows, columns] float64, finite.
    """
    if gain.size == 0:
        return []
    if gain.shape[0] > gain.shape[1]:
        return sorted((row, column) for column, row in best_assignment(gain.T))
    best = gain.argmax(axis=1)
    if len(set(best.tolist())) == len(best):  # nothing can be better, and mostly so
        return list(enumerate(best.tolist()))
    return _augmented(-gain)


def _augmented(cost: np.ndarray) -> list[tuple[int, int]]:
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    for start in range(rows):
        # Dijkstra's search over columns, from the row `start` to a column that is free.
        distance, before = np.full(columns, np.inf), np.full(columns, -1)
        seen = np.zeros(columns, bool)
        rows_seen, row, length, column = [start], start, 0.0, -1
        while True:
            through = length + cost[row] - row_price[row] - column_price
            shorter = ~seen & (through < distance)
            distance[shorter], before[shorter] = through[shorter], row
            column = int(np.where(seen, np.inf, distance).argmin())
            length = distance[column]
            seen[column] = True
            if row_of[column] < 0:
                break
            row = int(row_of[column])
            rows_seen.append(row)
        column_of = {int(row_of[c]): c for c in np.flatnonzero(seen) if row_of[c] >= 0}
        row_price[start] += length
        for row in rows_seen[1:]:
            row_price[row] += length - distance[column_of[row]]
        column_price[seen] -= length - distance[seen]
        while column >= 0:
            row = int(before[column])
            previous = column_of.get(row, -1)
            row_of[column] = row
            column = -1 if row == start else int(previous)
    return sorted((int(row), column) for column, row in enumerate(row_of) if row >= 0)
