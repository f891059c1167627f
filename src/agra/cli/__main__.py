"""Entry point of `python -m agra.cli`."""

from agra.cli.main import main
from agra.evaluation.remote import watch_parent

watch_parent()
main()
