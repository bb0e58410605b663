"""The keys of jobs that draw from generators of the hub, and what of them decides a picture: each is written here once.

`synthesize`, `evaluate_generators` and `probe_generators` extend these keys by their own.
"""

from dataclasses import dataclass

from gretfound.config import setting
from gretfound.errors import ConfigError
from jobs import pool
from jobs.pool import PoolConfig


@dataclass(frozen=True)
class DrawingConfig(PoolConfig):
    """Which generators draw, and how."""

    generator_ids: list[str] = setting([], "generator record ids; empty: the generators of all sites")
    num_steps: int = setting(20, "steps of DPM-Solver++, or of a few-step generator")
    guidance_scale: float = setting(3.0, "weight of the caption; 1: no guidance, as few-step generators need it")
    precision: str = setting("float32", "float32 or bfloat16")

    def __post_init__(self) -> None:
        """Checks names and counts."""
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision={self.precision!r} is neither float32 nor bfloat16")
        pool.require_counts(self, "num_steps", "batch_size", "num_actors")


# What a picture depends on, beside its caption and seed.
RESULT_KEYS = ("num_steps", "guidance_scale", "precision")
