"""The keys of jobs that work with a pool of actors, and what is done with these keys; each is written here once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gretfound.config import setting
from gretfound.errors import ConfigError
from jobs import console

if TYPE_CHECKING:
    from gretfound.generator_evaluation import Part


@dataclass(frozen=True)
class PoolConfig:
    """Where the hub lies, and the actors that work on it.

    It is a base class, where a recipe's groups are not: the keys have no prefix on the command line, and their order
    enters neither a record's files nor its id.
    """

    hub_uri: str = setting(help="where the hub lies: file://, s3://, gs://, abfs:// or a path")
    batch_size: int = setting(16, "photographs that an actor works on together, and holds at a time")
    num_actors: int = setting(1, "actors, each with its networks loaded")
    cpus_per_actor: float = setting(1.0, "CPUs that each one reserves")
    gpus_per_actor: float = setting(0.0, "GPUs that each one reserves; 0 takes the CPU")
    autoscaling: bool = setting(False, "whether the cluster adds nodes on demand")

    def __post_init__(self) -> None:
        """Checks counts."""
        require_counts(self, "batch_size", "num_actors")


def require_counts(config: PoolConfig, *names: str) -> None:
    """Checks keys that count something.

    Raises:
        ConfigError: If one of them is below 1; names them all.
    """
    if small := sorted(name for name in names if getattr(config, name) < 1):
        raise ConfigError(f"{', '.join(small)} must be at least 1")


def start(config: PoolConfig) -> None:
    """Joins Ray, or starts it, and requires that it holds the actors.

    Raises:
        ConfigError: If it does not.
    """
    from gretfound import fit

    console.start_ray()
    fit.check_resources(
        num_workers=config.num_actors,
        cpus_per_worker=config.cpus_per_actor,
        gpus_per_worker=config.gpus_per_actor,
        autoscaling=config.autoscaling,
    )


def arguments_of(config: PoolConfig) -> dict[str, Any]:
    """Returns what a function of the library that works with a pool of actors is told of it."""
    return {
        "num_actors": config.num_actors,
        "cpus_per_actor": config.cpus_per_actor,
        "gpus_per_actor": config.gpus_per_actor,
        "batch_size": config.batch_size,
        "device": "cuda" if config.gpus_per_actor else "cpu",
    }


def examine(config: PoolConfig, parts: "Sequence[Part]", *, doing: str, **more: Any) -> None:
    """Has the pool examine parts, under a bar; ``doing`` names it, and ``more`` goes to the library as it is."""
    from tqdm import tqdm

    from gretfound import generator_evaluation, storage

    with tqdm(total=sum(part.num for part in parts), desc=doing, unit="image") as bar:
        generator_evaluation.examine_parts(
            parts,
            **arguments_of(config),
            on_progress=bar.update,
            hub_uri=storage.normalised(config.hub_uri),
            **more,
        )
