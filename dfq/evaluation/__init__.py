"""Measuring detectors: COCO average precision on a labelled image set (`coco`)."""
