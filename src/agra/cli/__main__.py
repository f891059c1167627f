"""Entry point of `python -m agra.cli`."""

from agra.cli.main import main

main()
