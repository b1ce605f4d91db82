"""An ONNX file that somebody else exported, brought to the form that fusion expects."""

from pathlib import Path

import onnx

from reptrt.core.errors import ConfigError, option
from reptrt.exporter.front_door import Size, accept, raise_opset
from reptrt.graph.input_form import layout_of
from reptrt.graph.net import net_from_model, read_model


def model_from_file(path: Path, opset: int, input_size: Size | None) -> onnx.ModelProto:
    """Read an ONNX file through the front door and raise its opset.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: it is not a float net of one image batch (`front_door.accept`), or the size of
            its images is open or does not fit.
    """
    where = str(path)
    model = accept(read_model(path), where, input_size)
    value = model.graph.input[0]
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4:
        raise ConfigError(
            f"{where}: input {value.name} has rank {len(dims)}, expected (N, C, H, W)"
        )
    layout = layout_of(net_from_model(model))
    for name, dim in zip(layout[1:], dims[1:], strict=True):
        if not dim.dim_value:
            raise ConfigError(
                f"{where}: {name} of input {value.name} is not fixed; give "
                f"{option('input_size')} CxHxW"
            )
    return onnx.shape_inference.infer_shapes(raise_opset(model, where, opset))
