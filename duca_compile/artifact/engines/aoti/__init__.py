"""What runs artifacts of AOTInductor's code."""
