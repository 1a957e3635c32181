"""What a stage would need, found out without running it."""
