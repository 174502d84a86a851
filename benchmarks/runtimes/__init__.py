"""Exported files beside those of the runtimes' own quantizers."""
