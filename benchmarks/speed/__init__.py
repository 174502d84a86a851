"""Time and memory, always measured in turns beside a reference."""
