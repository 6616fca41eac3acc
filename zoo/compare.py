"""`python -m zoo.compare`: architectures head to head. Run, not imported: `zoo.eval` stands above this."""

import runpy

if __name__ == "__main__":  # the processes that train import this module again
    runpy.run_module("zoo.eval.compare.command", run_name="__main__", alter_sys=False)
