"""Options of `sweep`; importing this loads nothing heavy."""

from dataclasses import dataclass

from reptrt.core.errors import ConfigError, option
from reptrt.core.option_fields import check_bounds, described


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """Where the trials of a sweep run and where their results are kept."""

    store: str | None = described(
        None,
        "Folder of all results, which sweeps may share; or a URL that fsspec knows, such as "
        "s3://bucket/folder. Default: store in the folder of the sweep.",
        metavar="DIR|URL",
    )
    ray: str | None = described(
        None,
        "Run the trials on a Ray cluster: its address (host:port, ray://host:port, auto), or local "
        "for one on this machine. Default: processes of this machine.",
        metavar="ADDRESS|local",
    )
    workers: int | None = described(
        None,
        "Trials at a time on this machine; 0: one after the other in this process. Default: as "
        "many as there are cores for.",
        minimum=0,
    )
    threads: int = described(1, "CPU threads of a trial.", minimum=1)
    retries: int = described(
        2, "How often a trial is started again after its worker died.", minimum=0
    )
    dry_run: bool = described(
        False, "Check the file, say what is finished and what is left to do, and end."
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """Whether the images of an evaluation are divided, and where the parts run."""

    shards: int | None = described(
        None,
        "Divide the images into this many parts, which run at the same time and are kept: a part "
        "that is finished is never run again, and the numbers are those of all images in one.",
        minimum=1,
    )
    workers: int | None = described(
        None,
        "Parts at a time on this machine, with --threads each (default: 1); 0: one after the other "
        "in this process. Default: as many as there are cores for.",
        minimum=0,
    )
    ray: str | None = described(
        None,
        "Run the parts on a Ray cluster: its address (host:port, ray://host:port, auto), or local "
        "for one on this machine.",
        metavar="ADDRESS|local",
    )
    store: str | None = described(
        None,
        "Folder or URL where parts are kept. Default: eval in the user's cache folder.",
        metavar="DIR|URL",
    )
    retries: int = described(
        2, "How often a part is started again after its worker died.", minimum=0
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        given = [name for name in ("workers", "ray", "store") if getattr(self, name) is not None]
        if self.shards is None and given:
            raise ConfigError(
                f"{option(given[0], getattr(self, given[0]))}: the images are not divided; give "
                f"{option('shards')} too"
            )
