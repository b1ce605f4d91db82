"""export, calibrate, lint, build_engine and package, as a program calls them."""

import os
from dataclasses import fields
from typing import Any

from torch import nn

from reptrt.api.networks import NetworkLike, model_from, network_from, path_from
from reptrt.core.errors import ConfigError, option
from reptrt.core.keywords import changed, checked, options_from, takes
from reptrt.data.from_user import images_from
from reptrt.graph.model import Model
from reptrt.linter import LintReport
from reptrt.linter import lint as lint_network
from reptrt.pipeline import (
    Calibrated,
    CalibrateOptions,
    Exported,
    ExportOptions,
    Loaded,
    at_most_all,
    calibrate_net,
    calibration_images,
    export_net,
    float_model,
)
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source
from reptrt.trt.build import EngineSummary
from reptrt.trt.build import build_engine as build
from reptrt.trt.options import BuildOptions, PackageOptions
from reptrt.trt.package import PackageReport
from reptrt.trt.package import package as write_package

_ARCHITECTURE = tuple(item.name for item in fields(ArchitectureOptions))


@takes(ExportOptions, ArchitectureOptions)
def export(
    source: nn.Module | Source | str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    name: str | None = None,
    options: ExportOptions | None = None,
    **changes: Any,
) -> Exported:
    """Return a network as one fused float ONNX model, proved equal to where it came from.

    >>> net = reptrt.export(model, input_size=(3, 224, 224))
    >>> net.save("net.onnx")

    Args:
        source: a torch module, which is not changed (a copy is exported in eval mode); the name of
            a network of the zoo ("repvgg_a0"), "file.py:factory", "package.module:factory", or the
            path of an .onnx file in train form or fused.
        weights: a checkpoint for a network of the zoo or a factory, read as data.
        name: what tables call the network; None: the name of the source.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: the source, its weights or an option cannot be used; or the fused network
            differs from the source by more than the tolerance.
    """
    architecture = {key: changes.pop(key) for key in _ARCHITECTURE if key in changes}
    others = ("source", "weights", "name", *_ARCHITECTURE)
    exporting = options_from(ExportOptions, options, changes, others)
    name = checked("name", name, str | None)
    return export_net(source_from(source, weights, architecture), exporting, name=name)


def source_from(source: Any, weights: Any, architecture: dict[str, Any]) -> Source | nn.Module:
    """Return what is to be exported.

    Args:
        source: what the user passed.
        weights: a checkpoint, or None.
        architecture: fields of `ArchitectureOptions`.

    Raises:
        ConfigError: the source is of another type, or does not take weights or an architecture.
    """
    asked = [*(["weights"] if weights is not None else []), *architecture]
    if isinstance(source, nn.Module | Source):
        if asked:
            raise ConfigError(
                f"{option(asked[0])}: {type(source).__name__} has its own; leave it out"
            )
        return source
    if isinstance(source, Model):
        raise ConfigError(
            f"{option('source')}: got {source.name}, which is exported already; expected a torch "
            "module, a name or a path"
        )
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(
            f"{option('source')}: got {type(source).__name__}, expected a torch module, the name "
            "of a network, FILE.py:FACTORY or the path of an .onnx file"
        )
    checkpoint = None if weights is None else path_from(weights, "weights")
    return Source(
        os.fspath(source), checkpoint, changed(ArchitectureOptions(), architecture, ["weights"])
    )


@takes(CalibrateOptions)
def calibrate(
    net: NetworkLike,
    data: Any,
    *,
    name: str | None = None,
    options: CalibrateOptions | None = None,
    **changes: Any,
) -> Calibrated:
    """Quantize a float network to INT8, with scales measured on images.

    >>> int8 = reptrt.calibrate(net, loader, recipe="accurate", max_overhead=0)
    >>> print(int8.report)

    Args:
        net: a fused float network.
        data: calibration images; labels are ignored. An array or tensor (N, C, H, W) or
            (N, H, W, C), a DataLoader or other iterable of batches, a folder of images, an .npz or
            .npy. Pixels are uint8 and are prepared as the network says; floats are its input
            already, as a DataLoader with a normalizing transform yields them.
        name: what tables call the result; None: the name of the net, "int8" and the recipe.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: the network, the images or an option cannot be used.
    """
    calibrating = options_from(CalibrateOptions, options, changes, ("net", "data", "name"))
    name = checked("name", name, str | None)
    model = float_model(model_from(net, "net"))
    images = images_from(data, limit=calibrating.images, labels=False, parameter="data")
    if options is None and "images" not in changes:
        calibrating = at_most_all(calibrating, images)
    dataset = calibration_images(model, images, calibrating)
    return calibrate_net(model, dataset, calibrating, name=name)


def load(path: str | os.PathLike[str]) -> Loaded:
    """Return the network in an ONNX file as a value: it can be called, judged and saved again.

    >>> int8 = reptrt.load("a0.int8.onnx")
    >>> logits = int8(images)

    Args:
        path: the file, float or INT8.

    Raises:
        ConfigError: ``path`` is not a path.
        ArtifactError: the file cannot be read, or is not the one its sidecar was written for.
    """
    return Loaded.load(path_from(path, "path"))


def lint(net: NetworkLike) -> LintReport:
    """Check whether TensorRT accepts a Q/DQ network, and whether it will run fast.

    Needs neither TensorRT nor a GPU.

    Raises:
        ArtifactError: the file cannot be read.
    """
    return lint_network(network_from(net, option("net")))


@takes(BuildOptions)
def build_engine(
    net: NetworkLike,
    output: str | os.PathLike[str],
    *,
    options: BuildOptions | None = None,
    **changes: Any,
) -> EngineSummary:
    """Build a TensorRT engine and write it with its sidecar.

    >>> reptrt.build_engine(int8, "a0.engine", shapes="1:8:64")

    Args:
        net: an ONNX network, INT8 or float.
        output: the engine to write.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: there is no TensorRT, it refuses the network, or an option cannot be used.
    """
    building = options_from(BuildOptions, options, changes, ("net", "output"))
    return build(network_from(net, option("net")), path_from(output, "output"), building)


@takes(PackageOptions)
def package(
    net: NetworkLike,
    output: str | os.PathLike[str],
    *,
    options: PackageOptions | None = None,
    **changes: Any,
) -> PackageReport:
    """Write a network into a model repository of Triton Inference Server, or with NMS as ONNX.

    Args:
        net: an engine, or an ONNX network, INT8 or float.
        output: the repository, made if it does not exist; or a name that ends in .onnx.
        options: the options as one value, in place of their defaults.
        **changes: single options.

    Raises:
        ReptrtError: the network or an option cannot be used.
    """
    packing = options_from(PackageOptions, options, changes, ("net", "output"))
    return write_package(network_from(net, option("net")), path_from(output, "output"), packing)
