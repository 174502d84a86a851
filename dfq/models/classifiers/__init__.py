"""Classifiers: networks of torchvision and timm by name, and plain state dicts."""
