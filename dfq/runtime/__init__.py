"""What every room stands on: files, processes, devices, progress, bounds on input."""
