"""The command line: `python -m bench --help`."""

from .cli import app

app(prog_name="python -m bench")
