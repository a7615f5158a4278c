"""The command line."""

from dagpath.cli.app import main

__all__ = ["main"]
