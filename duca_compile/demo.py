"""The demo's former place."""

from duca_compile.app.demo import DemoModel, compare, draw, make_policies, make_policy

__all__ = ["DemoModel", "compare", "draw", "make_policies", "make_policy"]
