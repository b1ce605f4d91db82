"""What the splits of layers cost in onnxruntime on this machine, measured (``--measure``).

Each layer runs alone, whole and in each form that it may take, with its own shape: UINT8 codes in,
UINT8 codes out. The constants are made up, since kernels do not depend on them. What a form takes
longer than the whole layer is its cost. A run of one value takes off what a call costs. So that the
budget of extra work means the same, times are turned into multiply-accumulates by the mean rate of
the net's whole layers.
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from reptrt.core.choices import SplitForm
from reptrt.execute.runner import ort_version
from reptrt.execute.timing import time_models
from reptrt.graph.made_for import record_target
from reptrt.graph.net import Net, constant_of, model_from_net, weighted_nodes
from reptrt.graph.placement import place
from reptrt.graph.plan import plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.splitting import split_layers
from reptrt.quantize.choose.cost import layer_macs
from reptrt.quantize.targets import Costs
from reptrt.quantize.targets.timings import Timings, cache_folder, key_of
from reptrt.rewrite import split_coarse_fine as coarse_fine
from reptrt.rewrite import split_identity as identity
from reptrt.rewrite.fold_skip_scale import fold_skip_scale
from reptrt.rewrite.round_biases import round_biases
from reptrt.rewrite.to_unsigned import to_unsigned
from reptrt.trt.machine import cpu_name

_LOG = logging.getLogger(__name__)

_SCALE = 0.05  # of every pair


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the time of a layer depends on."""

    weight: tuple[int, ...]
    image: tuple[int, ...]  # of its input, (C, H, W)
    attributes: tuple[tuple[str, int | tuple[int, ...] | str], ...]
    forms: tuple[SplitForm, ...]  # that it may take, "none" first


def measured_costs(net: Net, layers: Collection[str], options: CalibrateOptions) -> Costs:
    """Return the costs of the target, with those of splits that were measured.

    Args:
        net: a float net with known shapes.
        layers: names of those that may be split.
        options: of calibration.
    """
    started = time.perf_counter()
    shapes = {
        node.name: shape
        for node in weighted_nodes(net.graph)
        if node.name in layers and (shape := _shape_of(node, options)) is not None
    }
    timings = Timings(cache_folder() / "timings.json")
    keys = {shape: _key(shape, options) for shape in shapes.values()}
    known = {key: times for key, times in timings.read().items() if key in keys.values()}
    new = [
        shape for shape, key in keys.items() if not set(shape.forms) <= known.get(key, {}).keys()
    ]
    found = {keys[shape]: _time(shape, options) for shape in new}
    if found:
        timings.add(found)
    known |= found
    times = {name: known[keys[shape]] for name, shape in shapes.items()}
    _LOG.info(
        "measure: %d layers have %d shapes; %d were timed in onnxruntime, %d are known from "
        "before; %.1f s",
        *(len(shapes), len(keys), len(new), len(keys) - len(new), time.perf_counter() - started),
    )
    return _costs(net, times, options)


def _costs(net: Net, times: Mapping[str, Mapping[str, float]], options: CalibrateOptions) -> Costs:
    """Return costs in multiply-accumulates."""
    costs = options.runtime.costs
    nodes = {node.name: node for node in weighted_nodes(net.graph)}
    whole = sum(of["none"] for of in times.values())
    if not whole:
        return costs
    rate = sum(layer_macs(nodes[name]) for name in times) / whole
    splits: dict[str, dict[SplitForm, float]] = {}
    for name, of in times.items():
        for form in (form for form in _FORMS if form in of):
            splits.setdefault(name, {})[form] = max(of[form] - of["none"], 0.0) * rate
    source = f"measured: onnxruntime {ort_version()}, {cpu_name()}, one thread, batch 1"
    return replace(costs, of_splits=splits, source=source)


_FORMS: tuple[SplitForm, ...] = ("identity-scalar", "identity", "coarse-fine")


def _shape_of(node: gs.Node, options: CalibrateOptions) -> _Shape | None:
    """Return what to time; None: the layer is no convolution, or its size is not known."""
    size = (node.inputs[0].shape or ())[1:]
    if node.op != "Conv" or len(size) != 3 or not all(isinstance(n, int) for n in size):
        return None
    forms: list[SplitForm] = ["none"]
    if identity.reason_against(node) is None:
        forms.append("identity-scalar")
        if options.summands == "float":
            forms.append("identity")
    if options.summands == "float" and coarse_fine.reason_against(node) is None:
        forms.append("coarse-fine")
    attributes = (
        (name, tuple(value) if isinstance(value, list) else value)
        for name, value in sorted(node.attrs.items())
    )
    weight = tuple(constant_of(node.inputs[1]).shape)
    return _Shape(weight, tuple(size), tuple(attributes), tuple(forms))


def _key(shape: _Shape, options: CalibrateOptions) -> str:
    attributes = [[name, value] for name, value in shape.attributes]
    layer = [shape.weight, shape.image, attributes, options.summands]
    return key_of({"machine": cpu_name(), "onnxruntime": ort_version(), "layer": layer})


def _time(shape: _Shape, options: CalibrateOptions) -> dict[str, float]:
    """Time the forms of a layer side by side; return the seconds of each without the call."""
    nothing = _Shape((1, 1, 1, 1), (1, 1, 1), (), ("none",))
    models = [_model(nothing, "none", options)]
    models += [_model(shape, form, options) for form in shape.forms]
    images = [nothing.image, *[shape.image] * len(shape.forms)]
    rng = np.random.default_rng(0)
    inputs = [rng.integers(0, 256, (1, *image), dtype=np.uint8) for image in images]
    call, *seconds = time_models(models, inputs)
    return {form: max(s - call, 0.0) for form, s in zip(shape.forms, seconds, strict=True)}


def _model(shape: _Shape, form: SplitForm, options: CalibrateOptions) -> onnx.ModelProto:
    """Return a model of one layer with a ReLU, from codes to codes."""
    net = _float_layer(shape)
    record_target(net, options.target)
    if form != "none":
        split_layers(net, {"layer": form}, options)
    placement = place(net)
    activations, weights = options.grids
    scales = {activation.tensor: _SCALE for activation in placement.activations}
    codes = quantize_weights(net, placement, weights)
    insert_qdq(net, plan_from_placement(placement, scales, codes, activations))
    round_biases(net)
    fold_skip_scale(net)
    to_unsigned(net)
    _from_codes_to_codes(net.graph)
    return model_from_net(net)


def _float_layer(shape: _Shape) -> Net:
    """Return a layer whose kernel is mostly the identity, if it can be."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 0.1, shape.weight).astype(np.float32)
    outputs, inputs, height, width = shape.weight
    each = np.arange(outputs)
    weight[each, each % inputs, height // 2, width // 2] += 1
    x = gs.Variable("x", np.float32, ("N", *shape.image))
    summed, y = gs.Variable("sum", np.float32), gs.Variable("y", np.float32)
    constants = [gs.Constant("weight", weight), gs.Constant("bias", np.zeros(outputs, np.float32))]
    conv = gs.Node("Conv", "layer", dict(shape.attributes), [x, *constants], [summed])
    relu = gs.Node("Relu", "relu", {}, [summed], [y])
    return Net(gs.Graph([conv, relu], inputs=[x], outputs=[y], opset=19))


def _from_codes_to_codes(graph: gs.Graph) -> None:
    """Drop the Q of the input, and put one behind the output."""
    (x,), (y,) = graph.inputs, graph.outputs
    first = next(node for node in x.outputs if node.op == "QuantizeLinear")
    codes = first.outputs[0]
    first.inputs.clear()
    first.outputs.clear()
    codes.dtype, codes.shape = np.dtype(np.uint8), x.shape
    graph.inputs = [codes]
    scale = gs.Constant("y.scale", np.array(_SCALE, np.float32))
    zero = gs.Constant("y.zero_point", np.array(0, np.uint8))
    result = gs.Variable("y.codes", np.uint8)
    graph.nodes.append(gs.Node("QuantizeLinear", "y.quantize", {}, [y, scale, zero], [result]))
    graph.outputs = [result]
    graph.cleanup().toposort()
