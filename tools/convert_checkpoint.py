"""`megamm convert` for those who look here: python tools/convert_checkpoint.py import|export|verify ..."""

from __future__ import annotations

import sys

from megamm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
