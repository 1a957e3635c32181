"""Plans and shards of single ranks."""
