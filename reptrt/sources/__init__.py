"""What a net is read from: zoo, factories, checkpoints, ONNX files."""
