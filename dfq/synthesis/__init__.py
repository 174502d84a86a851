"""Inversion of a frozen detector into images and labels."""
