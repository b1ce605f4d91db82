"""Images: folders and arrays as batches, prepared as the net says."""
