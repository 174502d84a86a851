"""Data at rest: calibration sets, and readers for real image sets."""
