"""The command line: a file for each command; `main` puts them together."""
