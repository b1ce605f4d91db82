"""A demonstration on handwritten digits, from checkpoint to engine, with a net that is included."""
