"""Engines that run AOTInductor's packages."""
