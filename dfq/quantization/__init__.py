"""What a quantized layer is: quantizers, ranges, layers, and how they get into a model."""
