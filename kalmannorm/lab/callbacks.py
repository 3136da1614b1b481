"""Another name of `kalmannorm.integrations.lightning`, in configurations that are kept."""

from kalmannorm.integrations.lightning import KalmanNormCallback, recalibrate_by_training_batches

__all__ = ["KalmanNormCallback", "recalibrate_by_training_batches"]
