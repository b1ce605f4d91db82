"""TrtRunner against modules with the recorded names of real releases, and a fake pycuda."""

import sys

import numpy as np
import pytest

from reptrt.core.errors import ConfigError, DataError, EngineError, MissingDependencyError
from reptrt.execute.runner import open_runner
from reptrt.judge.bench import bench
from reptrt.judge.options import BenchOptions
from reptrt.trt import driver
from reptrt.trt.driver import Gpu
from reptrt.trt.runner import TrtRunner
from tests.support.fake_tensorrt import API, FakeTensorrt, plan_of


@pytest.fixture(params=API)
def fake(request, monkeypatch):
    module = FakeTensorrt(request.param)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "pycuda.driver", module.cuda)
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("Fake GPU", "sm89", (12, 8)))
    return module


@pytest.fixture
def engine(fake, tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(plan_of(fake))
    return path


def images(n, dtype=np.float32):
    return np.random.default_rng(n).normal(size=(n, 3, 4, 4)).astype(dtype)


def expected(batch):
    rows = batch.reshape(len(batch), -1).astype(np.float32)
    return np.stack([rows.sum(axis=1), rows.max(axis=1)], axis=1)


def test_contract(fake, engine):
    with open_runner(engine) as runner:
        assert runner.name == "tensorrt"
        assert runner.device == "Fake GPU"
        assert runner.threads is None
        assert runner.input_name == "input"
        assert list(runner.output_names) == ["sums"]
        assert list(runner.input_shape) == [None, 3, 4, 4]


def test_outputs_are_those_of_each_batch(fake, engine):
    with TrtRunner(engine) as runner:
        first, second, third = images(2), images(2) + 1, images(5)
        results = [runner.run(batch)["sums"] for batch in (first, second, third)]
    for batch, result in zip((first, second, third), results, strict=True):
        np.testing.assert_array_equal(result, expected(batch))


def test_buffers_are_kept_for_one_shape_and_given_back(fake, engine):
    with TrtRunner(engine) as runner:
        runner.run(images(2))
        kept = set(fake.cuda.memory)
        runner.run(images(2))
        assert set(fake.cuda.memory) == kept
        assert len(fake.called("IExecutionContext.set_input_shape")) == 1
        runner.run(images(3))
        assert len(fake.cuda.memory) == len(kept) == 2
    assert fake.cuda.memory == {}
    assert fake.cuda.contexts == ["init", "push", "pop", "detach"]


def test_half_inputs(fake, engine):
    fake.input_dtype = "HALF"
    with TrtRunner(engine) as runner:
        batch = images(2)
        result = runner.run(batch)["sums"]
    np.testing.assert_allclose(result, expected(batch.astype(np.float16)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(65, 3, 4, 4), (0, 3, 4, 4), (1, 3, 5, 4), (3, 4, 4)], ids=str)
def test_a_batch_outside_the_profile(fake, engine, shape):
    with TrtRunner(engine) as runner:
        limits = r"engine takes \(1, 3, 4, 4\) to \(64, 3, 4, 4\); build it again for"
        with pytest.raises(DataError, match=limits):
            runner.run(np.zeros(shape, np.float32))
        runner.run(images(1))


def test_timing_with_and_without_host_copies(fake, engine):
    with TrtRunner(engine) as runner:
        bare = runner.time_ms(images(2), 3)
        whole = runner.time_ms(images(2), 3, host_copies=True)
        with pytest.raises(ConfigError, match="repeats: got 0"):
            runner.time_ms(images(2), 0)
    np.testing.assert_allclose(bare, [0.5] * 3)
    np.testing.assert_allclose(whole, [0.75] * 3)  # two copies of 0.125 each


def test_bench_leaves_the_copies_out_if_asked(fake, engine):
    (result,) = bench(
        [engine], BenchOptions(host_copies=False, min_seconds=0, warmup_seconds=0)
    ).results
    assert (result.device, result.host_copies, result.median_ms) == ("Fake GPU", False, 0.5)
    (result,) = bench([engine], BenchOptions(min_seconds=0, warmup_seconds=0)).results
    assert result.host_copies is True


def test_out_of_memory_is_one_line_and_the_runner_goes_on(fake, engine):
    with TrtRunner(engine) as runner:
        fake.cuda.limit = 1000
        with pytest.raises(
            EngineError, match=r"CUDA failed on Fake GPU: .*out of memory; .*smaller"
        ):
            runner.run(images(64))
        np.testing.assert_array_equal(runner.run(images(2))["sums"], expected(images(2)))
    assert fake.cuda.memory == {}


@pytest.mark.parametrize("wanted", [True, False])
def test_cuda_graph_replay_where_the_binding_offers_it(fake, engine, wanted):
    with TrtRunner(engine, cuda_graph=wanted):
        pass
    offered = "CudaGraphStrategy" in API[fake.release]
    strategies = fake.called("IRuntimeConfig.cuda_graph_strategy") if offered else []
    names = [strategy.name for (strategy,) in strategies]
    assert names == (["WHOLE_GRAPH_CAPTURE"] if wanted and offered else [])


def test_without_pycuda(fake, engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(MissingDependencyError, match=r"pycuda cannot be imported .*reptrt\[gpu\]"):
        TrtRunner(engine)


def test_without_a_gpu(fake, engine, monkeypatch):
    monkeypatch.setattr(driver, "find_gpu", lambda: "no NVIDIA driver on this machine")
    with pytest.raises(EngineError, match=r"m\.engine: using an engine needs an NVIDIA GPU: no NV"):
        TrtRunner(engine)


def test_a_failed_start_gives_everything_back(fake, engine, monkeypatch):
    monkeypatch.setattr(fake, "_context", lambda: None)
    with pytest.raises(EngineError, match="no execution context on Fake GPU"):
        TrtRunner(engine)
    assert fake.cuda.contexts == ["init", "push", "pop", "detach"]
