"""TensorRT: building engines, looking into them, running and packaging them."""
