"""Where a run happens: device, seeds, threads, precision, and many processes on torch's own engine."""
