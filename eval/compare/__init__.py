"""Architectures head to head on one dataset: `python -m zoo.compare`."""
