"""`python -m hwnas`: the command line without its entry point, as torchrun starts it."""

import sys

from hwnas.cli import main

if __name__ == "__main__":
    sys.exit(main())
