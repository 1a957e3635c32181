"""`python -m megamm` is `megamm`."""

import sys

from megamm.cli import main

if __name__ == "__main__":  # saving a checkpoint spawns processes that import this file again
    sys.exit(main())
