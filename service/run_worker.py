"""Runs a worker process; its modules are imported with the garbage collector off, which is faster."""

import gc
import sys


def run() -> None:
    """Import and run the worker, which turns the collector on again."""
    gc.disable()
    from .worker import main

    main(sys.argv[1:])


if __name__ == "__main__":
    run()
