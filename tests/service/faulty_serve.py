"""``hessquik serve`` with workers that fail on demand, and with ``quick`` pauses before their successors.

Only tests run it.
"""

import sys

from service import child, cli, workers

workers.WORKER_MODULE = "tests.service.faulty_worker"

if __name__ == "__main__":
    if sys.argv[1] == "quick":
        del sys.argv[1]
        child.FIRST_PAUSE_S, child.LONGEST_PAUSE_S = child.FIRST_PAUSE_S / 10, child.LONGEST_PAUSE_S / 10
    cli.main()
