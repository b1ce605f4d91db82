"""Run graphs in torch and in onnxruntime, with the same codes as INT8 kernels."""
