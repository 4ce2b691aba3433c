"""The ``hessquik`` command: it prepares the process before it imports the rest, which takes a while.

``python -m service`` in a checkout is the same command.
"""

import os
import signal
import sys

__all__ = ["main"]


def prepare() -> None:
    """Handle signals if this is a service, and open standard descriptors that are closed.

    A terminal that closes, or a group that is told to reload, ends neither a service nor its children, which inherit
    this. A stop ends it at once while nothing has started; without a handler, the first process of a container would
    not get it. A closed descriptor would be given to the next socket, which what is printed would then be written to.
    """
    if sys.argv[1:2] == ["serve"]:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free: this one
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r"))


def main() -> None:
    """Run the command."""
    prepare()
    from .cli import main as run

    run()


if __name__ == "__main__":
    main()
