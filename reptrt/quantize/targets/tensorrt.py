"""TensorRT: the sum of a split layer is part of the convolution's kernel and is made in float.

The Mul and the Add of an identity split are one pass: an engine runs all elementwise operations
behind a convolution as one kernel, with the skip as one more operand. Full range needs an Add of a
constant map behind each padded convolution, because TensorRT takes no zero point but 0.
"""

from reptrt.quantize.targets.target import Costs, Roofline, Target

TENSORRT = Target(
    name="tensorrt",
    precision="float",
    unsigned=False,
    float_ends=False,
    costs=Costs(
        pass_macs=8.0,
        border_macs=8.0,
        float_macs=2.0,
        crossing_macs=8.0,
        source="assumed: a pass moves a byte or two per value and computes next to nothing",
    ),
    roofline=Roofline(
        macs_per_byte=200.0,
        float_bytes=0.5,
        fuses_sums=True,
        source="data sheet of the A100: 312e12 multiply-accumulates in INT8 and 1.56e12 bytes a "
        "second",
    ),
)
