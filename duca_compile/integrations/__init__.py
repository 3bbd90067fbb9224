"""Integrations with other projects. No other package here knows them by name."""
