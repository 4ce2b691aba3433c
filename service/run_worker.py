"""Entry point of a worker process; imports run with the garbage collector off, which is faster."""

import gc
import sys

gc.disable()

from .worker import main  # noqa: E402

if __name__ == "__main__":
    main(sys.argv[1:])
