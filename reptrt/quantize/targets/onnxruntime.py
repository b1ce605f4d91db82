"""onnxruntime on a CPU: a sum runs in INT8 only if both summands have codes.

A convolution whose output is added in float has no INT8 kernel and runs in float. So the summands
of split layers are INT8. Full range costs nothing: the kernels take UINT8 codes with any zero
point, and pad with it.

The numbers were measured with onnxruntime's profiler on RepVGG-A0 (3 x 128 x 128, batch 1 and 32,
one thread, onnxruntime 1.32, x86 with AVX2 and without VNNI): a 3x3 convolution computes 56
multiply-accumulates per ns in INT8 and 40 in float; QLinearAdd takes 0.26 to 0.5 ns per value; a
value that leaves a float layer is reordered, quantized and transposed in 1.1 ns. With VNNI, INT8 is
faster, and what is not INT8 costs more.
"""

from reptrt.quantize.targets.target import Costs, Roofline, Target

ONNXRUNTIME = Target(
    name="onnxruntime",
    precision="int8",
    unsigned=True,
    float_ends=True,
    costs=Costs(
        pass_macs=16.0,
        border_macs=0.0,
        float_macs=1.4,
        crossing_macs=62.0,
        source="measured: RepVGG-A0, onnxruntime 1.32, AVX2 without VNNI, one thread",
    ),
    roofline=Roofline(
        macs_per_byte=7.0,
        float_bytes=1.0,
        fuses_sums=False,
        source="the same measurement: QLinearAdd moves 3 bytes for each value, 0.13 ns each",
    ),
)
