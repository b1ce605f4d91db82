"""The failures reptrt states itself; anything else that escapes is a bug and keeps its traceback.

    ReptrtError
    ├── ConfigError             an option that cannot work
    ├── ArtifactError           a file that cannot be read, written or trusted
    │   └── CheckpointError     ... a checkpoint
    ├── DataError               images or arrays that cannot be used
    ├── RewriteError            a graph that cannot be rewritten as asked
    ├── CalibrationError        numbers from which no scale follows
    ├── EngineError             TensorRT refused, or an engine does not fit
    └── MissingDependencyError  an optional package is not installed

A message is one line: where (file, layer or tensor), what was got, what was expected, what to do.
"""


class ReptrtError(Exception):
    """A stated failure: the command line prints its one line and exits with 1."""


class ConfigError(ReptrtError):
    """An option, or a combination of options, that cannot work."""


class ArtifactError(ReptrtError):
    """A file that cannot be read, written or trusted."""


class CheckpointError(ArtifactError):
    """A checkpoint that cannot be read, or does not fit the architecture."""


class DataError(ReptrtError):
    """Images or arrays that cannot be used."""


class RewriteError(ReptrtError):
    """A graph that cannot be rewritten as asked, or a rewrite that changed its output."""


class CalibrationError(ReptrtError):
    """Numbers from which no scale follows."""


class EngineError(ReptrtError):
    """TensorRT refused a graph, or an engine does not fit this machine."""


class MissingDependencyError(ReptrtError):
    """An optional package that this command needs is not installed."""
