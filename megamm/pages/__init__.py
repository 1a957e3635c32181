"""What the HTML pages that megamm writes have in common: one file each, which needs nothing else and fetches
nothing."""
