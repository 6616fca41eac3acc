"""What models cost against length, measured, and where one overtakes another: `python -m zoo.bench`."""

from zoo.eval.bench.measurement import BenchSettings, bench

__all__ = ["BenchSettings", "bench"]
