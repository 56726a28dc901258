"""One module for each command; each has `main(argv)`, which returns the exit code."""
