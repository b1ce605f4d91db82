"""Runtimes that an INT8 file can be made for: what runs in INT8 there, and what it costs.

target         the types
roofline       the time of a file by its shapes
measured       costs from the file of tools/gpu_check.py
tensorrt       NVIDIA GPUs
onnxruntime    CPUs
"""

from collections.abc import Mapping

from reptrt.core.choices import TargetName
from reptrt.quantize.targets.onnxruntime import ONNXRUNTIME
from reptrt.quantize.targets.target import Costs, Roofline, Target
from reptrt.quantize.targets.tensorrt import TENSORRT

__all__ = ["TARGETS", "Costs", "Roofline", "Target"]

TARGETS: Mapping[TargetName, Target] = {target.name: target for target in (TENSORRT, ONNXRUNTIME)}
