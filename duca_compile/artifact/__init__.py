"""Runs folders that ``duca_compile.save`` wrote. Needs neither torch nor the compiler."""
