"""Kalman Normalization for PyTorch: batch normalization that works at 1-4 samples a device."""

from kalmannorm import functional, rules
from kalmannorm.annealing import anneal
from kalmannorm.calibration import Calibration, calibrate
from kalmannorm.connect import connect
from kalmannorm.convert import convert, fuse, to_batchnorm
from kalmannorm.describe import Description, describe, first_nonfinite
from kalmannorm.diagnosis import Diagnosis, diagnose
from kalmannorm.freezing import freeze
from kalmannorm.gaussian import Gaussian, Unknown
from kalmannorm.graphs import capture
from kalmannorm.inference import online_statistics, recalibrate
from kalmannorm.modules import (
    GroupKalmanNorm,
    GroupKalmanNormAct,
    KalmanNorm,
    KalmanNorm1d,
    KalmanNorm2d,
    KalmanNorm3d,
    KalmanNormAct2d,
)
from kalmannorm.paper import preset
from kalmannorm.rules import rule
from kalmannorm.standardization import standardize_weights

__version__ = "0.1.0"

__all__ = [
    "Calibration", "Description", "Diagnosis", "Gaussian", "GroupKalmanNorm", "GroupKalmanNormAct", "KalmanNorm",
    "KalmanNorm1d", "KalmanNorm2d", "KalmanNorm3d", "KalmanNormAct2d", "Unknown", "anneal", "calibrate", "capture",
    "connect", "convert", "describe", "diagnose", "first_nonfinite", "freeze", "functional", "fuse",
    "online_statistics", "preset", "recalibrate", "rule", "rules", "standardize_weights", "to_batchnorm",
]  # fmt: skip
