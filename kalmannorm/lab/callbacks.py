"""Another name of `kalmannorm.integrations.lightning`, for existing configurations."""

from kalmannorm.integrations.lightning import KalmanNormCallback, recalibrate_by_training_batches

__all__ = ["KalmanNormCallback", "recalibrate_by_training_batches"]
