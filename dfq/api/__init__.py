"""The verbs of the package, a file each: what the command line calls, and what you can."""
