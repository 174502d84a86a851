"""Models of every family behind one door, `base`, and the one function that loads them."""

import os

from .base import Boundary, Detections, Detector, DistillationPair, Model, Targets
from .classifying import Classifier
from .loading import load_detector, load_model, require_detector
from .registry import from_spec
from .storage import save_detector

__all__ = [
    "Boundary",
    "Classifier",
    "Detections",
    "Detector",
    "DistillationPair",
    "Model",
    "Targets",
    "from_spec",
    "load_detector",
    "load_model",
    "require_detector",
    "save_detector",
]

# Read by Ultralytics when it is first imported; it would otherwise log to standard output.
os.environ.setdefault("YOLO_VERBOSE", "False")
# Installing packages behind the user's back is not for a library to do.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
