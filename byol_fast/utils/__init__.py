"""Files, devices, precision, environment, progress and signals."""
