"""What a program may pass as a network, and the errors for everything else."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from reptrt.core.errors import ConfigError, option
from reptrt.graph.model import Model, Network, is_engine

NetworkLike = str | os.PathLike[str] | Model
"""The path of an .onnx or .engine file; or what `export` and `calibrate` return."""

_EXPECTED = "expected the path of an ONNX file, or what reptrt.export or reptrt.calibrate returns"


def network_from(value: Any, where: str) -> Network:
    """Return a file or a model in memory.

    Args:
        value: what the user passed.
        where: the name of the parameter, for messages.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, Model):
        return value
    if isinstance(value, str | os.PathLike):
        return Path(value)
    if isinstance(value, nn.Module):
        raise ConfigError(
            f"{where}: got the torch module {type(value).__name__}, {_EXPECTED}; export it first: "
            "reptrt.export(module, input_size=(C, H, W))"
        )
    raise ConfigError(f"{where}: got {type(value).__name__}, {_EXPECTED}")


def networks_from(value: Any, parameter: str) -> list[Network]:
    """Return one network, or each of several, as a list without repetitions.

    Raises:
        ConfigError: an entry is no network, or there is none.
    """
    if isinstance(value, str | os.PathLike | Model | nn.Module):
        value = [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConfigError(
            f"{option(parameter)}: got {type(value).__name__}, expected a network or a list of them"
        )
    networks = [network_from(entry, f"{option(parameter)}[{i}]") for i, entry in enumerate(value)]
    if not networks:
        raise ConfigError(f"{option(parameter)}: got no networks, expected at least one")
    return list(dict.fromkeys(networks))


def model_from(value: Any, parameter: str) -> Model:
    """Return an ONNX model, read if it is a file.

    Raises:
        ConfigError: it is no network, or an engine.
        ArtifactError: the file cannot be read.
    """
    network = network_from(value, option(parameter))
    if isinstance(network, Model):
        return network
    if is_engine(network):
        raise ConfigError(f"{option(parameter)}: got the engine {network}, {_EXPECTED}")
    return Model.read(network)


def path_from(value: Any, parameter: str) -> Path:
    """Return a path.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, str | os.PathLike):
        return Path(value)
    raise ConfigError(f"{option(parameter)}: got {type(value).__name__}, expected a path")
