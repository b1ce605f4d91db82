"""An ONNX model as a value: read from a file, or made in memory and in no file yet."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from reptrt.core.artifacts import is_engine_file, read_sidecar, sha256_of
from reptrt.core.errors import ArtifactError
from reptrt.graph.net import Net, first_free, net_from_model, read_model
from reptrt.graph.preprocess import Preprocess, read_preprocess


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """An ONNX model and what it is called; not to be changed."""

    name: str  # of the file; of a model in memory, what tables, messages and sidecars call it
    proto: onnx.ModelProto
    sha256: str  # of the file's bytes, or of those that a file would have; hex
    path: Path | None = None  # None: the model was made in memory
    notes: tuple[str, ...] = ()  # what was said of it when it was brought into another form

    @staticmethod
    def read(path: Path) -> "Model":
        """Read an ONNX file; check it against its sidecar if it has one.

        Raises:
            ArtifactError: the file cannot be read, or is not the one its sidecar was written for.
        """
        sidecar = read_sidecar(path)
        proto = read_model(path)
        sha256 = sha256_of(path) if sidecar is None else sidecar.sha256
        return Model(name=path.name, proto=proto, sha256=sha256, path=path)

    @property
    def preprocess(self) -> Preprocess:
        """What turns an image into the model's input; see `read_preprocess`."""
        return read_preprocess(self.to_net())

    def to_net(self) -> Net:
        """Return a new graph of the model, which may be changed."""
        return net_from_model(self.proto)


Network = Path | Model  # a file of any kind, or a model in memory


def label_of(model: Network) -> str:
    """Return what tables and messages call a model or a file: its path if it has one."""
    if isinstance(model, Path):
        return str(model)
    return model.name if model.path is None else str(model.path)


def unique_labels(networks: Sequence[Network]) -> list[str]:
    """Return the labels of networks; models in memory of one name are told apart by a number."""
    labels: list[str] = []
    for network in networks:
        labels.append(first_free(label_of(network), labels))
    return labels


def is_engine(network: Network) -> bool:
    """Return whether a network is the file of an engine."""
    return isinstance(network, Path) and is_engine_file(network)


def proto_of(model: Network) -> onnx.ModelProto:
    """Return the ONNX model of a file or of a value, not to be changed.

    Raises:
        ArtifactError: the file cannot be read, or is not the one its sidecar was written for.
    """
    if not isinstance(model, Path):
        return model.proto
    read_sidecar(model)
    return read_model(model)


@contextlib.contextmanager
def blaming(model: Network) -> Iterator[None]:
    """Raise an ArtifactError in place of an unexpected error if the model itself is invalid.

    Rewrites assume that the nodes of a graph fit each other. ONNX's strict shape inference checks
    that, but it rejects some models that all runtimes accept, so it is run only after an error.

    Raises:
        ArtifactError: the block failed, and the nodes of the model do not fit each other.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as err:
        proto = onnx.load(model) if isinstance(model, Path) else model.proto
        try:
            onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        except onnx.shape_inference.InferenceError as defect:
            reason = " ".join(str(defect).split())
            where = label_of(model)
            raise ArtifactError(f"{where}: its nodes do not fit each other ({reason})") from err
        raise
