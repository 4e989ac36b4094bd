"""`python -m forge.cli` is the `forge` command, also where forge is not installed."""

import sys

from forge.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
