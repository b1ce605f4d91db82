"""An ONNX graph as a torch module: named tensors, any sub-graph, differentiable.

`TorchGraph` is the one executor of calibration and reconstruction. Operators are compiled once
(`reptrt.execute.torchops`); a run executes the nodes between the tensors it is given and those it
is asked for, and drops every tensor after its last reader, so memory is that of the widest point.

Number formats: every floating tensor is computed in the module's type, float32 unless ``.double()``
was called; FP16 in a graph is computed in that type too, its rounding is not simulated. Codes of
QuantizeLinear stay INT8. Shapes are computed on the CPU whatever the device.

Repeatable: on a CPU one image gives the same bits at any place in a batch of one size (other sizes
may differ: convolutions choose their kernels by it, a batch of one above all), and a sub-graph
gives the bits of the whole graph. On CUDA, runs use IEEE float32 (no TF32) and cuDNN's
deterministic kernels; put a training step in `exact_math` to have the same for its gradients.
"""

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import onnx
import torch
from torch import Tensor

from reptrt.core.errors import ConfigError, DataError, RewriteError
from reptrt.execute.torchops import OPERATORS
from reptrt.execute.torchops.node import Precision
from reptrt.execute.torchops.plan import Plan, comparable_tensors, plan_of, runnable_steps
from reptrt.execute.torchops.program import Step, program_from_net
from reptrt.execute.torchops.window import spatial_layout
from reptrt.graph.net import Net, net_from_model

Override = Callable[[Tensor], Tensor]
Observer = Callable[[Tensor], None]

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class TorchGraph(torch.nn.Module):
    """An ONNX graph as a torch module.

    Constants are buffers: ``.to(device)`` and ``.double()`` work as on any module; nothing requires
    a gradient.

    Args:
        net: the graph; it is not changed, and later changes to it are not seen.
        device: where to compute.

    Raises:
        RewriteError: a constant is of a type that torch does not have.
    """

    placement: Tensor  # an empty buffer: where the module is, and in which floating type

    def __init__(self, net: Net | onnx.ModelProto, device: torch.device | str = "cpu") -> None:
        super().__init__()
        source = net_from_model(net) if isinstance(net, onnx.ModelProto) else net
        self._precision = Precision()
        self._program = program_from_net(source, OPERATORS, self._precision)
        self._plans: dict[tuple[frozenset[str], ...], Plan] = {}
        # Buffers may not have dots in their names; ONNX tensors do.
        self._slots = {name: f"constant_{i}" for i, name in enumerate(self._program.constants)}
        for name, value in self._program.constants.items():
            self.register_buffer(self._slots[name], value)
        self.register_buffer("placement", torch.zeros(()))
        self._nodes = frozenset(step.name for step in self._program.steps)
        self._names = frozenset(name for step in self._program.steps for name in step.outputs)
        self._names |= self._program.inputs.keys() | self.constants.keys()
        self.to(device)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The nodes that can be run, in execution order, with their names, inputs and outputs."""
        return runnable_steps(self._program)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The graph's inputs."""
        return tuple(self._program.inputs)

    @property
    def input_shapes(self) -> Mapping[str, tuple[Any, ...]]:
        """The graph's inputs with their declared shapes: int, name or None per axis."""
        return MappingProxyType(dict(self._program.inputs))

    @property
    def output_names(self) -> tuple[str, ...]:
        """The graph's outputs."""
        return self._program.outputs

    @property
    def comparable_names(self) -> tuple[str, ...]:
        """The graph's outputs, or the last tensors in front of those that cannot be compared.

        See `reptrt.execute.torchops.plan.comparable_tensors`.
        """
        return comparable_tensors(self._program)

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The constants by ONNX name, those for shapes (on the CPU) included."""
        names = (*self._program.constants, *self._program.host_constants)
        return MappingProxyType({name: self._constant(name) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        """Return the first output for the only input.

        Raises:
            ConfigError: the graph has several inputs.
            DataError: the input does not have the declared shape.
        """
        if len(self._program.inputs) != 1:
            raise ConfigError(
                f"graph {self._program.name}: has inputs {', '.join(self.input_names)}, expected "
                "one; use run, which takes them by name"
            )
        output = self._program.outputs[0]
        return self.run({self.input_names[0]: x}, [output])[output]

    def run(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        *,
        overrides: Mapping[str, Override] = _NOTHING,
        replace: Mapping[str, Callable[..., Any]] = _NOTHING,
        observe: Mapping[str, Observer] = _NOTHING,
    ) -> dict[str, Tensor]:
        """Run the nodes between ``inputs`` and ``outputs``; return the outputs by name.

        Names in ``inputs``, ``overrides`` and ``replace`` that this sub-graph does not meet have no
        effect, so one set of hooks serves a whole net and each of its blocks.

        Args:
            inputs: any tensors of the graph, not only its inputs; what lies before them is not run.
                A constant's name replaces the constant for this run (a weight to be learned).
                Floating ones are brought to the module's device and type.
            outputs: any tensors of the graph.
            overrides: tensor name -> function of the tensor, applied once before anybody reads it
                (fake-quantize, an affine); inputs and constants included; an output that is
                overridden is returned so.
            replace: node name -> function of the node's inputs (None where one is omitted), run
                in place of its operator; returns a tensor, or a tuple if there are several outputs.
            observe: tensor name -> callback on the value that readers see; a tensor that no output
                needs is computed for its observer.

        Raises:
            ConfigError: a name is not in the graph, or an input is missing.
            DataError: a graph input does not have the declared shape (the batch axis is free).
            RewriteError: nodes between them cannot be run (all are named in one line), or a node
                cannot run on the shapes it gets.
        """
        plan = self._plan(frozenset(inputs), frozenset(outputs), frozenset(observe))
        self._check("overrides", overrides)
        self._check_nodes(replace)
        values: dict[str, Tensor | None] = {"": None}

        def store(name: str, value: Tensor) -> None:
            if name in values:
                return  # one of several outputs that was given
            if name in overrides:
                value = overrides[name](value)
            values[name] = value
            if name in observe:
                observe[name](value)

        with exact_math(self.placement.device):
            for name in plan.constants:
                store(name, self._constant(name))
            for name in plan.given:
                store(name, self._placed(name, inputs[name]))
            for step, last_read in plan.steps:
                _run_step(step, values, store, replace)
                for name in last_read:
                    del values[name]
        return {name: _present(values[name]) for name in outputs}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TorchGraph":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._precision.dtype = self.placement.dtype
        return self

    def _constant(self, name: str) -> Tensor:
        slot = self._slots.get(name)
        if slot is None:
            return self._program.host_constants[name]
        return _present(self._buffers[slot])

    def _plan(self, given: frozenset[str], kept: frozenset[str], observed: frozenset[str]) -> Plan:
        key = (given, kept, observed)
        if key not in self._plans:
            self._check("inputs", given)
            self._check("outputs", kept - self._program.captured)
            self._check("observe", observed - self._program.captured)
            self._plans[key] = plan_of(self._program, sorted(given), kept, observed)
        return self._plans[key]

    def _check(self, what: str, names: Collection[str]) -> None:
        """Raise a ConfigError unless all are tensors of the graph that a run can change."""
        for name in names:
            if name not in self._names:
                raise ConfigError(
                    f"{what}: graph {self._program.name} has no tensor {name!r}; "
                    f"expected a tensor's name, such as {_nearest_name(name, self._names)!r}"
                )
            if name in self._program.captured:
                raise ConfigError(
                    f"{what}: constant {name} is compiled into its operator and cannot be changed; "
                    "replace the node instead"
                )

    def _check_nodes(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self._nodes:
                raise ConfigError(
                    f"replace: graph {self._program.name} has no node {name!r}; "
                    f"expected a node's name, such as {_nearest_name(name, self._nodes)!r}"
                )

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """Check a given tensor against its declaration; bring it to the device, type and layout."""
        declared = self._program.inputs.get(name, ())
        if declared and not _fits(tuple(value.shape), declared):
            raise DataError(
                f"input {name}: shape is {list(value.shape)}, expected {list(declared)} "
                "(the first axis is free); give images of that size, or export the graph for others"
            )
        if value.dtype == torch.int64:
            return value  # a shape, or indices: operators bring it to the data where they meet
        dtype = self.placement.dtype if value.is_floating_point() else value.dtype
        return spatial_layout(value.to(self.placement.device, dtype))


def exact_math(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which CUDA convolutions are IEEE float32 and repeatable; else nothing.

    `TorchGraph.run` enters it by itself; a training step needs it around its backward pass too.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    flags: contextlib.AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


def _run_step(
    step: Step,
    values: Mapping[str, Tensor | None],
    store: Callable[[str, Tensor], None],
    replace: Mapping[str, Callable[..., Any]],
) -> None:
    arguments = [values[name] for name in step.inputs]
    function = replace.get(step.name)
    result = compute(step, arguments) if function is None else function(*arguments)
    if isinstance(result, tuple):
        for name, value in zip(step.outputs, result, strict=False):
            store(name, value)
    else:
        store(step.outputs[0], result)


def compute(step: Step, arguments: Sequence[Tensor | None]) -> Any:
    """Return what a step's operator returns.

    Raises:
        RewriteError: it failed; names the node and the shapes it got.
        torch.cuda.OutOfMemoryError: the device's memory is used up.
    """
    try:
        return step.function(*arguments)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError) as err:
        shapes = [None if value is None else list(value.shape) for value in arguments]
        reason = (str(err).strip() or repr(err)).splitlines()[0]
        raise RewriteError(
            f"node {step.name} ({step.op}): cannot run on shapes {shapes} ({reason}); if the graph "
            "was exported for one batch size, export it with a dynamic one"
        ) from err


def _nearest_name(name: str, names: Collection[str]) -> str:
    return get_close_matches(name, sorted(names), 1, cutoff=0.0)[0]


def _present(value: Tensor | None) -> Tensor:
    if value is None:
        raise TypeError("a tensor was expected")
    return value


def _fits(shape: tuple[int, ...], declared: tuple[Any, ...]) -> bool:
    """Return whether a shape has the declared rank and fixed sizes, the first axis apart."""
    return len(shape) == len(declared) and all(
        size == wanted
        for size, wanted in zip(shape[1:], declared[1:], strict=True)
        if isinstance(wanted, int) and wanted > 0
    )
