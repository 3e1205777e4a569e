"""The command line: `python -m bench --help`."""

from . import cli_methods  # noqa: F401  it adds its commands to the app
from .cli import app

app(prog_name="python -m bench")
