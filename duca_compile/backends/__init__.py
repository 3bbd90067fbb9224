"""Backends: each turns a variant into a callable."""
