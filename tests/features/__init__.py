"""Conditions that users run models in, and what becomes of each: docs/followed.md is written from these cases."""
