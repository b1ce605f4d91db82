"""Running graphs: in torch, in onnxruntime, with the codes of INT8 kernels."""
