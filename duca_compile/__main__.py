"""``python -m duca_compile``: the command line."""

from duca_compile.cli import app

app(prog_name="duca-compile")
