"""What other projects say of their models and loops. Nothing else of the package knows them by name."""
