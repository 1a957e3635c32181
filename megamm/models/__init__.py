"""The models, written to be read beside their papers."""
