"""reptrt: re-parameterized CNNs from a PyTorch checkpoint to an accurate INT8 TensorRT engine.

The Python API is `reptrt.pipeline`: one function per command of the command line.
"""

__version__ = "0.1.0"
