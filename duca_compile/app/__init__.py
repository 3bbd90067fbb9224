"""The command line, the demo and its data, and reports."""
