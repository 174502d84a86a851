"""C functions compiled for the processor at hand, each with its equal in PyTorch."""
