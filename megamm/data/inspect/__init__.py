"""What a prepared dataset holds and what is broken in it: `megamm data check`, `stats` and `preview`.

All three read a `PreparedDataset` as training does, in memory that does not grow with its size.
"""
