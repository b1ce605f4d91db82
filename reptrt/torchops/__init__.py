"""ONNX operators as torch functions, and the compiler from a graph to steps.

node.py          what a builder knows of its node
elementwise.py, layers.py, pooling.py, reductions.py, shapes.py, resize.py, quantize.py
the builders, by kind
program.py       a graph -> constants and steps
"""

from collections.abc import Mapping
from types import MappingProxyType

from reptrt.torchops.elementwise import ELEMENTWISE
from reptrt.torchops.layers import LAYERS
from reptrt.torchops.node import Builder
from reptrt.torchops.pooling import POOLING
from reptrt.torchops.quantize import QUANTIZE
from reptrt.torchops.reductions import REDUCTIONS
from reptrt.torchops.resize import RESIZE
from reptrt.torchops.shapes import SHAPES

OPERATORS: Mapping[str, Builder] = MappingProxyType(
    {**ELEMENTWISE, **LAYERS, **POOLING, **REDUCTIONS, **SHAPES, **RESIZE, **QUANTIZE}
)

__all__ = ["OPERATORS"]
