"""The command line: one file a group of commands. Nothing heavy is imported until a command runs."""

from open_pisces.cli.commands import main

__all__ = ["main"]
