"""``python -m open_pisces``: the command line, as torchrun starts it."""

import sys

from open_pisces.cli import main

if __name__ == "__main__":
    sys.exit(main())
