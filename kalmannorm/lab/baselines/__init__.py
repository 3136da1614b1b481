"""The normalizations that Kalman Normalization is compared with, as replacements of BatchNorm layers."""
