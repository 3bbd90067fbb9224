"""The command line, the demo with its data, and reports."""
