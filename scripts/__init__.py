"""Commands that train networks: the demo detector, and others to measure on."""
