"""Training the low-bit network with the original as its teacher."""
