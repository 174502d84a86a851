"""Quantization-aware training inside mmdet: importing it registers what dfq's configs name."""

from .runner import DFQCalibrationHook, DFQCalibrationSet, DFQDistiller, DFQDistributed

__all__ = ["DFQCalibrationHook", "DFQCalibrationSet", "DFQDistiller", "DFQDistributed"]
