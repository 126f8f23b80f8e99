"""The files of a TensorFlow checkpoint: tensors (bundle) and the graph beside them (graph)."""
