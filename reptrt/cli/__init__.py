"""The command line: `main` is what the command ``reptrt`` runs."""

from reptrt.cli.group import main

__all__ = ["main"]
