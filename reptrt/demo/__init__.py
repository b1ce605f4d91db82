"""The main job on a net small enough to carry: handwritten digits, from checkpoint to engine."""
