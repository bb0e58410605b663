"""The keys of jobs that draw from generators of the hub, and what of them decides a picture: each is written here once.

`synthesize`, `evaluate_generators` and `probe_generators` extend these keys by their own.
"""

from dataclasses import dataclass

from gretfound.config import setting
from gretfound.errors import ConfigError


@dataclass(frozen=True)
class DrawingConfig:
    """Which generators draw, how, and on what.

    It is a base class, where a recipe's groups are not: the keys have no prefix on the command line, and their order
    enters neither a record's files nor its id.
    """

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    generator_ids: list[str] = setting([], "generator record ids; empty: the generators of all sites")
    num_steps: int = setting(20, "steps of DPM-Solver++, or of a few-step generator")
    guidance_scale: float = setting(3.0, "weight of the caption; 1: no guidance, as few-step generators need it")
    precision: str = setting("float32", "float32 or bfloat16")
    batch_size: int = setting(16, "photographs that an actor draws together, and holds at a time")
    num_actors: int = setting(1, "actors that draw, each with a pipeline loaded")
    cpus_per_actor: float = setting(1.0, "CPUs that each one reserves")
    gpus_per_actor: float = setting(0.0, "GPUs that each one reserves; 0 draws on CPU")
    autoscaling: bool = setting(False, "whether the cluster adds nodes on demand")

    def __post_init__(self) -> None:
        """Checks names and counts."""
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision={self.precision!r} is neither float32 nor bfloat16")
        require_counts(self, "num_steps", "batch_size", "num_actors")


# What a picture depends on, beside its caption and seed.
RESULT_KEYS = ("num_steps", "guidance_scale", "precision")


def require_counts(config: DrawingConfig, *names: str) -> None:
    """Checks keys that count something.

    Raises:
        ConfigError: If one of them is below 1; names them all.
    """
    if small := sorted(name for name in names if getattr(config, name) < 1):
        raise ConfigError(f"{', '.join(small)} must be at least 1")
