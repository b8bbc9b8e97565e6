"""`python -m safeloader` is the command `safeloader`."""

import sys

from safeloader.cli import main

if __name__ == "__main__":
    sys.exit(main())
