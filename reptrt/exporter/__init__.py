"""A module or ONNX file as one fused float ONNX graph, and the proof."""
