"""Detectors of mmdet: accuracy, cost, its own training script, which configs work."""
