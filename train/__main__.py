"""`python -m zoo.train`."""

import sys

from zoo.console import run_cli


def _main() -> int:
    from zoo.train.cli import main  # here, because Ctrl-C may come in the seconds that this import takes

    return main()


if __name__ == "__main__":
    sys.exit(run_cli(_main))
