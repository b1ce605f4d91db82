"""onnxruntime on a CPU: a sum runs in INT8 only if both summands have codes.

A convolution whose output is added in float has no INT8 kernel and runs in float, which takes three
to six times as long. So the summands of split layers are INT8. Full range costs nothing: the
kernels take UINT8 codes with zero point 0, and pad with that code.
"""

from reptrt.quantize.targets.target import Costs, Target

ONNXRUNTIME = Target(
    name="onnxruntime",
    precision="int8",
    costs=Costs(
        pass_macs=8.0,
        border_macs=0.0,
        source="full range: none by construction; the pass: assumed",
    ),
)
