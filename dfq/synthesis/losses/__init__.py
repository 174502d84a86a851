"""Terms of the synthesis loss."""
