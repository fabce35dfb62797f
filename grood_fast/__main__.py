"""``python -m grood_fast``: the command line."""

from grood_fast.cli import main

main()
