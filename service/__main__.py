"""``python -m service`` in a checkout is the ``hessquik`` command."""

from .cli import main

main()
