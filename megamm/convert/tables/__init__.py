"""One module for each family of checkpoints: its keys, its configuration, its files."""
