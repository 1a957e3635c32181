"""The comparison of layouts with one process."""
