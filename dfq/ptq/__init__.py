"""Low-bit weights found without training: layer by layer, from what the layers compute."""
