"""Accuracy of low-bit networks on real images."""
