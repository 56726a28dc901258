"""The queue of measurements and checks for a GPU host: `python -m benchmarks.gpu`, or `make gpu`."""
