"""Runs a folder that ``duca_compile.save`` wrote. Needs neither torch nor the compiler."""
