"""``python -m dagpath``."""

from dagpath.cli import main

main()
