"""Measurements of dfq: each module is a command, `python -m benchmarks.accuracy.qat --help`."""
