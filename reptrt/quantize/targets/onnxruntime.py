"""onnxruntime on a CPU: a sum runs in INT8 only if both summands have codes.

A convolution whose output is added in float has no INT8 kernel and runs in float. So the summands
of split layers are INT8. Full range costs nothing: the kernels take UINT8 codes with any zero
point, and pad with it.

The numbers are those of a CPU with VNNI, where INT8 is fastest and all else costs most beside it.
They were measured with onnxruntime's profiler on RepVGG-A0 (3 x 64 x 64, batch 32, one thread,
onnxruntime 1.32, x86 with AVX-512 VNNI): a 3x3 convolution computes 420 to 490
multiply-accumulates per ns in INT8 and 120 in float; QLinearAdd takes 0.11 ns per value; a value
that leaves a float layer is reordered, quantized and transposed in 0.65 ns. With AVX2 and without
VNNI it was 56, 40, 0.26 to 0.5, and 1.1.
"""

from reptrt.quantize.targets.target import Costs, Roofline, Target

ONNXRUNTIME = Target(
    name="onnxruntime",
    precision="int8",
    unsigned=True,
    float_ends=True,
    costs=Costs(
        pass_macs=52.0,
        border_macs=0.0,
        float_macs=3.9,
        crossing_macs=300.0,
        source="measured: RepVGG-A0, onnxruntime 1.32, AVX-512 VNNI, one thread",
    ),
    roofline=Roofline(
        macs_per_byte=17.0,
        float_bytes=1.0,
        fuses_sums=False,
        source="the same measurement: QLinearAdd moves 3 bytes for each value, 0.037 ns each",
    ),
)
