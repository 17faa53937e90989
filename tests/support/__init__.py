"""What the tests stand on: tiny random models, a forward pass written by hand, and plain transformers."""
