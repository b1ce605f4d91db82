"""ONNX operators as torch functions, and the compiler from a graph to steps.

`node` is the view of a node that a builder gets. The builders are in `elementwise`, `indexing`,
`layers`, `pooling`, `quantize`, `reductions`, `resize` and `shapes`, by kind of operator. `program`
compiles a graph to constants and steps, and `plan` selects the steps of one run.
"""

from collections.abc import Mapping
from types import MappingProxyType

from reptrt.execute.torchops.elementwise import ELEMENTWISE
from reptrt.execute.torchops.indexing import INDEXING
from reptrt.execute.torchops.layers import LAYERS
from reptrt.execute.torchops.node import Builder
from reptrt.execute.torchops.pooling import POOLING
from reptrt.execute.torchops.quantize import QUANTIZE
from reptrt.execute.torchops.reductions import REDUCTIONS
from reptrt.execute.torchops.resize import RESIZE
from reptrt.execute.torchops.shapes import SHAPES

OPERATORS: Mapping[str, Builder] = MappingProxyType(
    {**ELEMENTWISE, **INDEXING, **LAYERS, **POOLING, **QUANTIZE, **REDUCTIONS, **RESIZE, **SHAPES}
)

__all__ = ["OPERATORS"]
