"""Ultralytics' anchor-free detectors."""
