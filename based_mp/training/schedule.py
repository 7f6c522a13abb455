"""The learning rate as a function of the step alone."""

from __future__ import annotations

import math

from based_mp.config import Config


def learning_rate(step: int, config: Config) -> float:
    """Learning rate of 0-based `step`: linear from warmup_start_lr, then cosine from lr to min_lr at decay_steps."""
    o = config.optimizer
    if step < o.warmup_steps:
        return o.warmup_start_lr + (o.lr - o.warmup_start_lr) * step / o.warmup_steps
    span = max(config.decay_steps - o.warmup_steps, 1)
    progress = min((step - o.warmup_steps) / span, 1.0)
    return o.min_lr + (o.lr - o.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
