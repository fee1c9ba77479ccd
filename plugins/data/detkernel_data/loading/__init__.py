"""From a data set to batches: which images, in which worker, in which order."""
