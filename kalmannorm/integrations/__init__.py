"""Kalman layers in other libraries' training loops."""
