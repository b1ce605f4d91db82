"""ONNX graphs: the net, what travels with it, where Q/DQ pairs go, how they are written."""
