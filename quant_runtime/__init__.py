"""Low-bit layers and the kernels under them. Knows layers and tensors, and no model by name."""

__version__ = "0.1.0"
