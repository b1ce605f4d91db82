"""NMS in engines: which TensorRT has it, and the graph with it."""

import onnx

from reptrt.core.errors import ConfigError
from reptrt.core.nms_options import PLUGIN, NmsOptions
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.rewrite.append_nms import append_nms
from reptrt.trt.versions import Backend, no_nms

_OPERATORS = (PLUGIN, "NonMaxSuppression")


def with_nms(
    backend: Backend, where: str, model: onnx.ModelProto, options: NmsOptions
) -> onnx.ModelProto:
    """Return the graph with TensorRT's NMS behind it, if the options ask for it.

    It comes after the conversion to FP16, which leaves the outputs in FP32: boxes of some hundred
    pixels need it.

    Raises:
        ConfigError: the backend has no NMS, and the graph or the options ask for it.
        RewriteError: what the outputs mean is not known, or they need no NMS.
    """
    node = next((node for node in model.graph.node if node.op_type in _OPERATORS), None)
    if node is not None and not backend.features.plugins:
        raise ConfigError(f"{where}: node {node.name} ({node.op_type}): {no_nms(backend.label)}")
    if not options.append:
        return model
    net = net_from_model(model)
    append_nms(net, "plugin", options)
    return model_from_net(net)
