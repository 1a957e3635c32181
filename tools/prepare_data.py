"""`megamm prepare` for those who look here: python tools/prepare_data.py SOURCE... --format F ..."""

from __future__ import annotations

import sys

from megamm.cli import main

if __name__ == "__main__":  # workers import this file again
    sys.exit(main(["prepare", *sys.argv[1:]]))
