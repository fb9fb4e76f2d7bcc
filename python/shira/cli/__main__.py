"""`python -m shira.cli` is the command `shira`."""

from shira.cli.app import main

main()
