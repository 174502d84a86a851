"""From a detector to a file that a runtime executes, and back: what is in such a file, how it is
run, and whether it is right."""
