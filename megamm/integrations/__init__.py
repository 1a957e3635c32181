"""megamm inside other tools, which find it by entry points (pyproject.toml)."""
