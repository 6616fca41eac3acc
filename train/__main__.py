"""`python -m zoo.train`."""

import sys

from zoo.train.cli import main

if __name__ == "__main__":
    sys.exit(main())
