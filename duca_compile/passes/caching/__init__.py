"""Rewrites that replace values by cached ones."""
