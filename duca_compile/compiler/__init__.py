"""One call through all stages: captured, analysed, verified, fitted to a budget, and kept ready to run."""
