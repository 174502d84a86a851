"""The original YOLOv5."""
