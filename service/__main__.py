"""``python -m service`` in a checkout is the ``hessquik`` command."""

import os
from pathlib import Path

# Worker processes do not look for modules in the current folder: they get the one that this package is in.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (os.environ.get("PYTHONPATH"), str(Path(__file__).parent.parent)))
)

from .cli import main

main()
