"""A gradient batch, shared out among processes and accumulated batches."""

from __future__ import annotations

import lightning


def images_a_process(gradient_batch: int, trainer: lightning.Trainer | None) -> int:
    """Images that one process takes at a time, so that all of them together make a gradient step.

    Args:
        gradient_batch: Images a gradient step: over all processes, and over the batches that one accumulates.
        trainer: Knows how many there are of both; None for one of each.

    Raises:
        ValueError: The gradient batch does not divide evenly.
    """
    processes, accumulated = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
    if gradient_batch < 1:
        raise ValueError(f"gradient_batch must be at least 1; got {gradient_batch}")
    share, rest = divmod(gradient_batch, processes * accumulated)
    if rest:
        raise ValueError(
            f"gradient_batch must be a multiple of {processes * accumulated}, as {processes} processes accumulate "
            f"{accumulated} batches each; got {gradient_batch}"
        )
    return share
