"""What is learnt about a network by watching a forward pass."""
