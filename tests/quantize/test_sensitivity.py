"""What layers cost alone, against nets with one quantized layer that onnxruntime runs."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from reptrt.core.clock import Clock
from reptrt.data.dataset import open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.probes import probes_of
from reptrt.pipeline.options import PLAIN_INT8, CalibrateOptions
from reptrt.pipeline.planning import Planned, plan_net
from reptrt.quantize.calib.sensitivity import NetPair, errors_alone
from tests.support.helpers import ort_run
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.qdq_nets import images, residual_net

COUNT = 11  # a whole batch and a part of one


def planned(model: onnx.ModelProto, x: np.ndarray, folder: Path, **options: object) -> Planned:
    np.savez(folder / "x.npz", x=x)
    net = net_from_model(model)
    dataset = open_dataset(folder / "x.npz", read_preprocess(net))
    return plan_net(net, dataset, CalibrateOptions(images=len(x), **options), Clock())  # type: ignore[arg-type]


def only(plan: Planned, layer: str) -> onnx.ModelProto:
    """The float net with one layer, whole, as it is in the Q/DQ net: input, weight and bias."""
    model, whole = (model_from_net(net) for net in (plan.reference, plan.quantized()))
    makers = {name: node for node in whole.graph.node for name in node.output}
    values = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
    in_int8 = next(node for node in whole.graph.node if node.name == layer)
    node = next(node for node in model.graph.node if node.name == layer)
    place = list(model.graph.node).index(node)
    pair = makers[in_int8.input[0]]
    while pair.op_type != "DequantizeLinear":
        pair = makers[pair.input[0]]
    weight = makers[in_int8.input[1]]
    codes, scale = (values[name].astype(np.float64) for name in weight.input[:2])
    axis = next((a.i for a in weight.attribute if a.name == "axis"), 1)
    shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
    constants = {
        "the.scale": values[pair.input[1]],
        "the.zero": values[pair.input[2]],
        "the.weight": (codes * scale.reshape(shape)).astype(np.float32),
        **({"the.bias": values[in_int8.input[2]]} if len(in_int8.input) > 2 else {}),
    }
    read = node.input[0]
    del node.input[:]
    node.input.extend(["the.dq", "the.weight", *(["the.bias"] if "the.bias" in constants else [])])
    for offset, (op, names) in enumerate(
        {"QuantizeLinear": (read, "the.q"), "DequantizeLinear": ("the.q", "the.dq")}.items()
    ):
        made = helper.make_node(op, [names[0], "the.scale", "the.zero"], [names[1]])
        model.graph.node.insert(place + offset, made)
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items())
    return model


def alone(plan: Planned, x: np.ndarray, folder: Path) -> dict[str, float]:
    np.savez(folder / "x.npz", x=x)
    dataset = open_dataset(folder / "x.npz", read_preprocess(plan.reference))
    pair = NetPair(TorchGraph(plan.reference), TorchGraph(plan.quantized()))
    probes = probes_of(plan.reference, plan.layers)
    return errors_alone(pair, probes[::-1], dataset)


@pytest.mark.parametrize("correct_bias", [False, True])
def test_one_layer_alone_is_what_onnxruntime_computes(tmp_path: Path, correct_bias: bool) -> None:
    x = images(COUNT)
    plan = planned(residual_net(), x, tmp_path, split="none", correct_bias=correct_bias)
    found = alone(plan, x, tmp_path)
    exact = ort_run(model_from_net(plan.reference), {"x": x}, optimize=False)["head"]
    assert len(found) == len(plan.layers) > 10
    for layer, error in found.items():
        got = ort_run(only(plan, layer), {"x": x}, optimize=False)["head"]
        expected = float(((got - exact) ** 2).sum() / (exact**2).sum())
        assert error == pytest.approx(expected, rel=0.02), layer


def test_errors_alone_add_up_to_the_error_of_the_net(tmp_path: Path) -> None:
    path = write_net(tmp_path / "m.onnx", rep_net())
    data = write_images(tmp_path / "d.npz", 32)
    net = net_from_model(onnx.load(str(path)))
    (x,) = open_dataset(data, read_preprocess(net)).batches(32)
    plan = planned(onnx.load(str(path)), x, tmp_path, split="coarse-fine", weight_bits=5)
    found = alone(plan, x, tmp_path)
    assert set(found) == {"stem", "block0", "block1", "block2", "head"}  # splits are one layer
    exact, got = (TorchGraph(net) for net in (plan.reference, plan.quantized()))
    name = exact.output_names[0]
    outputs = [graph.run({"x": torch.from_numpy(x)}, [name])[name] for graph in (exact, got)]
    whole = float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum())
    assert 0.5 < sum(found.values()) / whole < 2.0


def test_plain_codes_make_the_coarsest_layer_the_worst(tmp_path: Path) -> None:
    """A layer whose input has one huge value in one channel loses all others."""
    model = residual_net()
    x = images(COUNT)
    x[:, 0, 0, 0] = 300.0
    net = net_from_model(model)
    np.savez(tmp_path / "x.npz", x=x)
    dataset = open_dataset(tmp_path / "x.npz", read_preprocess(net))
    plan = plan_net(net, dataset, PLAIN_INT8, Clock())
    found = alone(plan, x, tmp_path)
    assert max(found, key=lambda layer: found[layer]) == "stem"
