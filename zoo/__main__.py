"""`python -m zoo VERB ...`."""

from zoo.cli import main

main()
