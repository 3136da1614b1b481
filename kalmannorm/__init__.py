"""Kalman Normalization for PyTorch: batch normalization that works at 1-4 samples a device."""

from kalmannorm import functional, rules
from kalmannorm.convert import connect, convert, fuse, to_batchnorm
from kalmannorm.describe import Description, describe, first_nonfinite
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.inference import online_statistics
from kalmannorm.modules import GroupKalmanNorm, KalmanNorm, KalmanNorm1d, KalmanNorm2d, KalmanNorm3d, preset
from kalmannorm.rules import rule

__version__ = "0.1.0"

__all__ = [
    "Description", "Gaussian", "GroupKalmanNorm", "KalmanNorm", "KalmanNorm1d", "KalmanNorm2d", "KalmanNorm3d",
    "Unknown", "connect", "convert", "describe", "first_nonfinite", "functional", "fuse", "online_statistics",
    "preset", "rule", "rules", "to_batchnorm",
]  # fmt: skip
