"""The types and names that all stages share. Imports nothing else of the package but its errors."""
