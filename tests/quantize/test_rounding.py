"""Fake quantization and learned rounding with their gradients, against their formulas."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from reptrt.core.grid import Grid, dequantize, quantize
from reptrt.graph.qdq import quantize_weight
from reptrt.quantize.reconstruct.fake_quantize import fake_quantize
from reptrt.quantize.reconstruct.rounding import SoftCodes, beta_at
from reptrt.quantize.reconstruct.state import WeightSite
from tests.support.helpers import ort_run

GRIDS = {
    "int8": Grid.activation(8),
    "uint8": Grid.activation(8).full_range,
    "6 bits": Grid.activation(6),
    "6 bits from 0": Grid.activation(6).full_range,
    "weights": Grid.weight(8),
}


def samples(step: float, grid: Grid) -> torch.Tensor:
    """Return values on both sides of every border between codes, and ties."""
    rng = np.random.default_rng(0)
    codes = np.concatenate(
        [
            rng.uniform(grid.qmin - 40, grid.qmax + 40, 500),
            np.arange(grid.qmin - 3, grid.qmax + 3.5, 0.5),
        ]
    )
    return torch.from_numpy((codes * step).astype(np.float32))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("step", [1.0, 0.0173, 3e-7])
def test_values_are_those_of_the_deployment_grid(name: str, step: float) -> None:
    grid = GRIDS[name]
    x, scale = samples(step, grid), np.float32(step)
    got = fake_quantize(x, torch.tensor(scale), grid).numpy()
    codes = np.clip(np.rint(x.numpy() / scale), grid.qmin, grid.qmax)
    np.testing.assert_array_equal(got, codes * scale)
    if grid.qmax <= 127:
        np.testing.assert_array_equal(got, dequantize(quantize(x.numpy(), scale, grid), scale))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_values_are_onnxruntimes(dtype: type) -> None:
    grid = GRIDS[np.dtype(dtype).name]
    x = samples(0.0173, grid)
    pair = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        pair,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(x)])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(x)])],
        [
            numpy_helper.from_array(np.float32(0.0173).reshape(()), "s"),
            numpy_helper.from_array(np.zeros((), dtype), "z"),
        ],
    )
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9
    )
    got = fake_quantize(x, torch.tensor(np.float32(0.0173)), grid)
    np.testing.assert_array_equal(got.numpy(), ort_run(model, {"x": x.numpy()})["y"])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(GRIDS)),
    step=st.floats(1e-3, 10),
    seed=st.integers(0, 999),
)
def test_gradients_are_the_formula(name: str, step: float, seed: int) -> None:
    """d/dx: 1 inside, else 0. d/dstep: code - x / step inside, else the code."""
    grid, rng = GRIDS[name], np.random.default_rng(seed)
    scaled = rng.uniform(grid.qmin - 30, grid.qmax + 30, (4, 5))
    x = torch.tensor(scaled * step, dtype=torch.float32, requires_grad=True)
    s = torch.tensor(step, dtype=torch.float32, requires_grad=True)
    weight = rng.standard_normal((4, 5))
    (fake_quantize(x, s, grid) * torch.tensor(weight, dtype=torch.float32)).sum().backward()
    assert x.grad is not None
    assert s.grad is not None
    scaled = x.detach().numpy().astype(np.float64) / np.float64(np.float32(step))
    codes = np.rint(scaled)
    inside = (codes >= grid.qmin) & (codes <= grid.qmax)
    np.testing.assert_allclose(x.grad.numpy(), np.where(inside, weight, 0), rtol=1e-6)
    of_step = np.where(inside, codes - scaled, np.clip(codes, grid.qmin, grid.qmax))
    np.testing.assert_allclose(float(s.grad), (weight * of_step).sum(), rtol=1e-3, atol=1e-2)


def test_where_x_is_clipped_the_gradient_of_the_step_is_exact() -> None:
    """There the value is qmin or qmax times the step, so a difference quotient agrees."""
    for grid in GRIDS.values():
        x = torch.tensor([grid.qmax + 9.0, grid.qmin - 9.0, grid.qmax + 2.0], dtype=torch.float64)
        s = torch.ones((), dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(fake_quantize(x, s, grid).sum(), s)
        low, high = (fake_quantize(x, s.detach() + e, grid).sum() for e in (-1e-4, 1e-4))
        assert float(gradient) == pytest.approx(float(high - low) / 2e-4, rel=1e-6)


def test_a_step_that_is_not_learned_and_an_image() -> None:
    step = torch.tensor(0.1)
    x = torch.ones(3, requires_grad=True)
    fake_quantize(x, step, GRIDS["int8"]).sum().backward()
    assert torch.equal(x.grad, torch.ones(3))  # type: ignore[arg-type]
    learned = torch.tensor(0.1, requires_grad=True)
    fake_quantize(torch.tensor([0.14]), learned, GRIDS["int8"]).sum().backward()
    assert learned.grad is not None
    assert float(learned.grad) == pytest.approx(1 - 1.4, rel=1e-5)


# Learned rounding --------------------------------------------------------------------------------


def site(weight: np.ndarray, grid: Grid) -> WeightSite:
    quantized = quantize_weight(weight, 0, grid)
    scale = quantized.scale.reshape(-1, *[1] * (weight.ndim - 1))
    return WeightSite(
        "layer", torch.from_numpy(weight), torch.from_numpy(scale), "dq", "layer", False
    )


def kernel(seed: int = 0) -> np.ndarray:
    """Return small taps, a large one, a dead channel, zeros, and weights that equal codes."""
    weight = np.random.default_rng(seed).standard_normal((5, 3, 3, 3)).astype(np.float32)
    weight[1, 0, 1, 1] = 20.0
    weight[2] = 0.0
    weight[3, 1] = 0.0
    weight[4] = np.float32(127 / 64) * np.linspace(-1, 1, 27, dtype=np.float32).reshape(3, 3, 3)
    return weight


def soft_of(*weights: np.ndarray, grid: Grid) -> tuple[SoftCodes, list[WeightSite]]:
    """Return the soft codes of weights, and the sites with the names 0, 1, ..."""
    sites = [replace(site(weight, grid), node=str(i)) for i, weight in enumerate(weights)]
    return SoftCodes(sites, {site.node: nearest_of(site, grid) for site in sites}, grid), sites


def nearest_of(site: WeightSite, grid: Grid) -> torch.Tensor:
    return (site.weight / site.scale).round().clamp(grid.qmin, grid.qmax)


def plain_weights(soft: SoftCodes, sites: list[WeightSite], grid: Grid) -> dict[str, torch.Tensor]:
    """The formula, layer by layer; differentiable."""
    weights, start = {}, 0
    for found in sites:
        shape, exact = found.weight.shape, found.weight / found.scale
        v = soft.v[start : start + exact.numel()]
        if len(shape) == 4:  # kept channels last
            v = v.reshape(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        start += exact.numel()
        h = (1.2 * torch.sigmoid(v.reshape(shape)) - 0.1).clamp(0, 1)
        low, high = (f(exact).clamp(grid.qmin, grid.qmax) for f in (torch.floor, torch.ceil))
        weights[found.node] = (torch.floor(exact) + h).clamp(low, high) * found.scale
    return weights


def regularizer(soft: SoftCodes, beta: float) -> torch.Tensor:
    h = (1.2 * torch.sigmoid(soft.v) - 0.1).clamp(0, 1)
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


@pytest.mark.parametrize("away", [0, 1, -3])
@pytest.mark.parametrize("bits", [8, 6, 4, 2])
def test_at_first_weights_are_a_fifth_of_the_way_from_the_codes(bits: int, away: int) -> None:
    """Equal up to float32 rounding in a sigmoid and its inverse: a few millionths of a step."""
    grid = Grid.weight(bits)
    found = replace(site(kernel(), grid), node="0")
    codes = (nearest_of(found, grid) + away).clamp(grid.qmin, grid.qmax)
    soft = SoftCodes([found], {"0": codes}, grid)
    exact = found.weight / found.scale
    expected = (codes + 0.2 * (exact - codes)).clamp(codes - 1, codes + 1)
    got = soft.weights()["0"].detach() / found.scale
    np.testing.assert_allclose(got, expected.clamp(grid.qmin, grid.qmax), atol=4e-5)
    with torch.no_grad():
        for push, wanted in ((-99.0, torch.minimum), (99.0, torch.maximum)):
            soft.v.copy_(torch.full_like(soft.v, push))
            other = (codes + torch.sign(exact - codes)).clamp(grid.qmin, grid.qmax)
            assert torch.equal(soft.harden()["0"], wanted(codes, other))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("push", [-9.0, -0.7, 0.7, 9.0, "random"])
def test_hardened_codes_are_floors_or_ceilings_inside_the_grid(
    bits: int, push: float | str
) -> None:
    grid = Grid.weight(bits)
    soft, (found,) = soft_of(kernel(1), grid=grid)
    noise = torch.randn(soft.v.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        soft.v += 5 * noise if isinstance(push, str) else push
    scaled = (found.weight / found.scale).numpy()
    low = np.clip(np.floor(scaled), grid.qmin, grid.qmax)
    high = np.clip(np.ceil(scaled), grid.qmin, grid.qmax)
    between = soft.weights()["0"].detach() / found.scale
    for codes in (soft.harden()["0"].numpy(), between.numpy()):
        assert ((codes >= low - 1e-5) & (codes <= high + 1e-5)).all()
    hard = soft.harden()["0"].numpy()
    assert ((hard == low) | (hard == high)).all()
    assert np.abs(hard).max() <= grid.qmax
    if push == 9.0:
        np.testing.assert_array_equal(hard, high)
    if push == -9.0:
        np.testing.assert_array_equal(hard, low)


def test_hardening_rounds_what_was_learned() -> None:
    grid = Grid.weight(8)
    soft, (found,) = soft_of(kernel(2), grid=grid)
    with torch.no_grad():
        soft.v += torch.randn(soft.v.shape, generator=torch.Generator().manual_seed(1))
    learned = soft.weights()["0"].detach() / found.scale
    undecided = (learned - learned.round()).abs() > 0.49
    assert torch.equal(soft.harden()["0"][~undecided], learned.round()[~undecided])


@pytest.mark.parametrize("beta", [None, 20.0, 7.5, 2.0])
@pytest.mark.parametrize("bits", [8, 3])
def test_weights_and_gradients_are_those_of_the_formula(bits: int, beta: float | None) -> None:
    """Several layers in one buffer; oracle: autograd of the formula, layer by layer."""
    grid, rng = Grid.weight(bits), np.random.default_rng(bits)
    dense, narrow = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((7, 11), (4, 1, 3, 3))
    )
    soft, sites = soft_of(kernel(3), dense, narrow, grid=grid)
    with torch.no_grad():
        soft.v += 2 * torch.randn(soft.v.shape, generator=torch.Generator().manual_seed(2))
    loss = [torch.from_numpy(rng.standard_normal(s.weight.shape).astype(np.float32)) for s in sites]
    plain, found = plain_weights(soft, sites, grid), soft.weights(beta, 0.25)
    gradients = []
    for weights, extra in ((found, 0.0), (plain, 0.25 if beta else 0.0)):
        total = sum(
            ((weights[s.node] * factor).sum() for s, factor in zip(sites, loss, strict=True)),
            start=extra * regularizer(soft, beta or 1.0),
        )
        (gradient,) = torch.autograd.grad(total, soft.v)
        gradients.append(gradient)
    for found_site in sites:
        torch.testing.assert_close(found[found_site.node], plain[found_site.node])
    exact = torch.cat(
        [
            (s.weight / s.scale).permute(0, 2, 3, 1).reshape(-1)
            if s.weight.dim() == 4
            else (s.weight / s.scale).reshape(-1)
            for s in sites
        ]
    )
    free = exact != exact.round()  # what already is a code does not move
    torch.testing.assert_close(gradients[0][free], gradients[1][free], rtol=2e-4, atol=2e-6)


def test_the_regularizer_decides() -> None:
    grid = Grid.weight(8)
    soft, (found,) = soft_of(kernel(), grid=grid)
    optimizer = torch.optim.Adam([soft.v], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        (0.0 * soft.weights(2.0, 1.0)["0"]).sum().backward()
        optimizer.step()
    codes = soft.weights()["0"].detach() / found.scale
    assert float((codes - codes.round()).abs().max()) < 1e-3


def test_beta_falls_after_a_warm_up() -> None:
    betas = [beta_at(step, 100) for step in range(100)]
    assert betas[:20] == [None] * 20
    later = [beta for beta in betas if beta is not None]
    assert len(later) == 80
    assert later[0] == 20.0
    assert later == sorted(later, reverse=True)
    assert 2.0 <= later[-1] < 2.1
    assert later[40] == pytest.approx(11.0)
