"""`python -m zoo.eval model=FOLDER data=mqar`: how well a trained model does on a dataset, or on a suite of them."""

import sys

from zoo.console import run_cli


def _main() -> None:
    from zoo.eval.command import main  # here, because Ctrl-C may come in the seconds that this import takes

    main()


if __name__ == "__main__":
    sys.exit(run_cli(_main))
