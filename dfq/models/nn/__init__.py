"""Layers that show operations which other layers hide."""
