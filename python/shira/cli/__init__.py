"""The command `shira`, the only part of the package that prints."""

from shira.cli.app import main as main
