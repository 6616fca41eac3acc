"""`python -m zoo.bench`: what architectures cost against length. Run, not imported: `zoo.eval` stands above this."""

import runpy

if __name__ == "__main__":  # the processes that measure import this module again
    runpy.run_module("zoo.eval.bench.command", run_name="__main__", alter_sys=False)
