"""``python -m duca_compile``: the command line."""

from duca_compile.app.cli import app

app(prog_name="duca-compile")
