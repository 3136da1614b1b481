"""The normalizations that Kalman Normalization is compared with, each as a replacement of BatchNorm layers."""
