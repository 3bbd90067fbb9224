"""Runs variants step by step: clock, cache state, token selection, dispatch. Needs no compiler."""
