"""An ONNX graph as a differentiable torch module that can run any sub-graph between named tensors.

`TorchGraph` is the only executor of calibration and reconstruction. Operators are compiled once
(`reptrt.execute.torchops`). A run executes the nodes between its input tensors and the requested
tensors, and frees every tensor after its last consumer, so that the widest point of the graph
determines the memory.

Number formats: every floating tensor is computed in the module's type, which is float32 unless
``.double()`` was called. FP16 tensors are computed in that type too; their rounding is not
simulated. Codes of QuantizeLinear stay integers. Shapes are always computed on the CPU.

Reproducibility: on a CPU, an image gives the same bits at every position of a batch of one size.
Other batch sizes may give other bits, because convolutions select their kernels by the size (a
batch of one in particular). A sub-graph gives the bits of the whole graph. On CUDA, runs use IEEE
float32 (no TF32) and cuDNN's deterministic kernels; run a training step inside `exact_math` to get
the same for its gradients.

A graph whose batch size is fixed runs any number of images: it runs its own batch size again and
again, and the results are joined, unless it computes the same from all images at once.
"""

import contextlib
import functools
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
from reptrt.graph.heads import Heads, heads_of
from reptrt.graph.net import Net, net_from_model

Override = Callable[[Tensor], Tensor]
Observer = Callable[[Tensor], None]

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_SAME = 1e-5  # of the largest value: what another batch size may change


class TorchGraph(torch.nn.Module):
    """An ONNX graph as a torch module.

    Constants are buffers, so ``.to(device)`` and ``.double()`` work as on any module; no constant
    requires a gradient.

    Args:
        net: the graph; it is not changed, and later changes to it are not seen.
        device: where to compute.

    Raises:
        RewriteError: a constant is of a type that torch does not have.
    """

    placement: Tensor  # a buffer that only shows the module's device and floating type

    def __init__(self, net: Net | onnx.ModelProto, device: torch.device | str = "cpu") -> None:
        super().__init__()
        source = net_from_model(net) if isinstance(net, onnx.ModelProto) else net
        self._precision = Precision()
        self._program = program_from_net(source, OPERATORS, self._precision)
        self._plans: dict[tuple[frozenset[str], ...], Plan] = {}
        # Names of buffers must not contain dots; names of ONNX tensors do.
        self._slots = {name: f"constant_{i}" for i, name in enumerate(self._program.constants)}
        for name, value in self._program.constants.items():
            self.register_buffer(self._slots[name], value)
        self.register_buffer("placement", torch.zeros(()))
        self._nodes = frozenset(step.name for step in self._program.steps)
        self._names = frozenset(name for step in self._program.steps for name in step.outputs)
        self._names |= self._program.inputs.keys() | self.constants.keys()
        self._declared = {name: t.shape for name, t in source.graph.tensors().items() if t.shape}
        self._heads = heads_of(source)
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
        """The graph's outputs; those that cannot be compared are replaced by tensors before them.

        See `reptrt.execute.torchops.plan.comparable_tensors`.
        """
        return comparable_tensors(self._program)

    @property
    def heads(self) -> Heads:
        """The raw heads of a detector; none if they cannot be run. See `reptrt.graph.heads`."""
        runnable = {name for step in self.steps for name in step.outputs}
        return self._heads if runnable.issuperset(self._heads.names) else Heads()

    @property
    def constants(self) -> Mapping[str, Tensor]:
        """The constants by ONNX name, including those that compute shapes (on the CPU)."""
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

        Names in ``inputs``, ``overrides`` and ``replace`` that do not occur in this sub-graph have
        no effect, so that one set of hooks can be used for a whole net and for each of its blocks.

        Args:
            inputs: values of any tensors of the graph, not only of its inputs; nodes before them
                are not run. The name of a constant replaces the constant for this run (such as a
                weight that is learned). Floating values are moved to the module's device and type.
            outputs: names of any tensors of the graph.
            overrides: tensor name -> function of the tensor (fake quantization, an affine), applied
                once before any node reads the tensor. Inputs and constants can be overridden too;
                an overridden output is returned with its new value.
            replace: node name -> function of the node's inputs (None for an omitted one) that runs
                in place of the operator; it returns a tensor, or a tuple for several outputs.
            observe: tensor name -> callback, called with the value that consumers read; a tensor
                that no output needs is computed for its observer.

        Raises:
            ConfigError: a name is not in the graph, or an input is missing.
            DataError: a graph input does not have the declared shape (the batch axis is free).
            RewriteError: some of the nodes cannot be run (one message names all of them), or a
                node cannot run on the shapes of its inputs.
        """
        if (parts := self._num_parts(inputs)) > 1 and not self._takes_any_batch:
            return self._run_parts(parts, inputs, outputs, overrides, replace, observe)
        return self._run(inputs, outputs, overrides, replace, observe)

    def _run(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        overrides: Mapping[str, Override] = _NOTHING,
        replace: Mapping[str, Callable[..., Any]] = _NOTHING,
        observe: Mapping[str, Observer] = _NOTHING,
    ) -> dict[str, Tensor]:
        plan = self._plan(frozenset(inputs), frozenset(outputs), frozenset(observe))
        self._check("overrides", overrides)
        self._check_nodes(replace)
        values: dict[str, Tensor | None] = {"": None}

        def store(name: str, value: Tensor) -> None:
            if name in values:
                return  # one of a node's several outputs is also an input of the run
            if name in overrides:
                value = overrides[name](value)
            values[name] = value
            if name in observe:
                observe[name](value)

        with exact_math(self.placement.device):
            for name in plan.constants:
                store(name, self._constant(name))
            for name in plan.inputs:
                store(name, self._placed(name, inputs[name]))
            for step, last_read in plan.steps:
                _run_step(step, values, store, replace)
                for name in last_read:
                    del values[name]
        return {name: _present(values[name]) for name in outputs}

    def _run_parts(
        self,
        parts: int,
        inputs: Mapping[str, Tensor],
        outputs: Sequence[str],
        overrides: Mapping[str, Override],
        replace: Mapping[str, Callable[..., Any]],
        observe: Mapping[str, Observer],
    ) -> dict[str, Tensor]:
        """Run in parts of the graph's own batch size; the last repeats its last image."""
        names = list(dict.fromkeys((*outputs, *observe)))
        results: dict[str, list[Tensor]] = {name: [] for name in names}
        for index in range(parts):
            part = {
                name: _part(value, index, self._rows(name)) if name in self._per_image else value
                for name, value in inputs.items()
            }
            for name, value in self._run(part, names, overrides, replace).items():
                results[name].append(value)
        images = max(
            value.shape[0] / self._rows(name)
            for name, value in inputs.items()
            if name in self._per_image
        )
        joined = {
            name: _joined(values, images) if name in self._per_image else values[0]
            for name, values in results.items()
        }
        for name, observer in observe.items():
            observer(joined[name])
        return {name: joined[name] for name in outputs}

    def _num_parts(self, inputs: Mapping[str, Tensor]) -> int:
        """Return how many batches of a fixed size the given tensors hold; 1 if it is free."""
        if self._fixed_batch is None:
            return 1
        return max(
            (
                -(-value.shape[0] // self._rows(name))
                for name, value in inputs.items()
                if name in self._per_image and value.dim()
            ),
            default=1,
        )

    def _rows(self, name: str) -> int:
        """Return the first size that a tensor has at the graph's own batch size."""
        first = self._declared.get(name, (None,))[0]
        return first if isinstance(first, int) and first > 0 else self._fixed_batch or 1

    @functools.cached_property
    def _per_image(self) -> frozenset[str]:
        """The tensors that depend on the graph's inputs; all others are the same for all images."""
        names = set(self._program.inputs)
        for step in self._program.steps:
            if not names.isdisjoint(step.inputs):
                names.update(step.outputs)
        return frozenset(names)

    @functools.cached_property
    def _fixed_batch(self) -> int | None:
        shape = next(iter(self._program.inputs.values()), ())
        return shape[0] if shape and isinstance(shape[0], int) and shape[0] > 0 else None

    @functools.cached_property
    def _takes_any_batch(self) -> bool:
        """Whether two batches at once give what one after the other gives, on random images."""
        (name, shape), *others = self._program.inputs.items()
        if others or not all(isinstance(size, int) for size in shape):
            return False
        generator = torch.Generator().manual_seed(0)
        images = torch.rand((2 * shape[0], *shape[1:]), generator=generator)
        outputs = self.comparable_names
        try:
            with torch.no_grad():
                apart = [self._run({name: x}, outputs) for x in torch.split(images, shape[0])]
                at_once = self._run({name: images}, outputs)
        except RewriteError:
            return False
        return all(
            _is_close(at_once[output], [part[output] for part in apart]) for output in outputs
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TorchGraph":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._precision.dtype = self.placement.dtype
        return self

    def _constant(self, name: str) -> Tensor:
        slot = self._slots.get(name)
        if slot is None:
            return self._program.host_constants[name]
        return _present(self._buffers[slot])

    def _plan(
        self, inputs: frozenset[str], outputs: frozenset[str], observed: frozenset[str]
    ) -> Plan:
        key = (inputs, outputs, observed)
        if key not in self._plans:
            self._check("inputs", inputs)
            self._check("outputs", outputs - self._program.captured)
            self._check("observe", observed - self._program.captured)
            self._plans[key] = plan_of(self._program, sorted(inputs), outputs, observed)
        return self._plans[key]

    def _check(self, argument: str, names: Collection[str]) -> None:
        """Raise a ConfigError unless all names are tensors of the graph that a run can change."""
        for name in names:
            if name not in self._names:
                raise ConfigError(
                    f"{argument}: graph {self._program.name} has no tensor {name!r}; "
                    f"expected a tensor's name, such as {_nearest_name(name, self._names)!r}"
                )
            if name in self._program.captured:
                raise ConfigError(
                    f"{argument}: constant {name} is compiled into its operator and cannot be "
                    "changed; replace the node instead"
                )

    def _check_nodes(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self._nodes:
                raise ConfigError(
                    f"replace: graph {self._program.name} has no node {name!r}; "
                    f"expected a node's name, such as {_nearest_name(name, self._nodes)!r}"
                )

    def _placed(self, name: str, value: Tensor) -> Tensor:
        """Check an input's shape, and move the input to the module's device, type and layout."""
        declared = self._program.inputs.get(name, ())
        if declared and not _fits(tuple(value.shape), declared):
            raise DataError(
                f"input {name}: shape is {list(value.shape)}, expected {list(declared)} "
                "(the first axis is free); give images of that size, or export the graph for others"
            )
        if value.dtype == torch.int64:
            return value  # a shape or indices: operators move them to the device of the data
        dtype = self.placement.dtype if value.is_floating_point() else value.dtype
        return spatial_layout(value.to(self.placement.device, dtype))


def exact_math(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which convolutions on CUDA are IEEE float32 and reproducible.

    On other devices the context changes nothing. `TorchGraph.run` enters it by itself; a training
    step must enter it for its backward pass.
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
    """Run a step's operator and return its result.

    Raises:
        RewriteError: the operator failed; the message names the node and the shapes of its inputs.
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


def _part(value: Tensor, index: int, rows: int) -> Tensor:
    """Return a part of a tensor by its first axis, filled up with its last row."""
    if not value.dim():
        return value
    part = value[index * rows : (index + 1) * rows]
    missing = rows - part.shape[0]
    return torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]) if missing else part


def _joined(values: Sequence[Tensor], images: float) -> Tensor:
    """Return the results of parts in one tensor, without those of images that were filled up.

    Args:
        values: the result of each part.
        images: how many parts were given; the last may be broken.
    """
    if not values[0].dim():
        return values[0]
    return torch.cat(list(values))[: round(images * values[0].shape[0])]


def _is_close(at_once: Tensor, apart: Sequence[Tensor]) -> bool:
    if not apart[0].dim():
        return False
    expected = torch.cat(list(apart))
    if at_once.shape != expected.shape:
        return False
    tolerance = _SAME * float(expected.abs().amax()) if expected.numel() else 0.0
    return bool(((at_once - expected).abs() <= tolerance).all())


def _nearest_name(name: str, names: Collection[str]) -> str:
    return get_close_matches(name, sorted(names), 1, cutoff=0.0)[0]


def _present(value: Tensor | None) -> Tensor:
    if value is None:
        raise TypeError("a tensor was expected")
    return value


def _fits(shape: tuple[int, ...], declared: tuple[Any, ...]) -> bool:
    """Return whether a shape has the declared rank and the declared sizes behind the first axis."""
    return len(shape) == len(declared) and all(
        size == expected
        for size, expected in zip(shape[1:], declared[1:], strict=True)
        if isinstance(expected, int) and expected > 0
    )
