"""`python -m megamm` is `megamm`."""

import sys

from megamm.cli import main

if __name__ == "__main__":  # workers of `megamm prepare` import this file again
    sys.exit(main())
