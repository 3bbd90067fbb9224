"""A variant to a callable."""
