"""Rewrites that keep every result bit for bit."""
