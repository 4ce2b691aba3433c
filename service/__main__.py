"""``python -m service`` is the ``hessquik`` command."""

from service.cli import main

main()
