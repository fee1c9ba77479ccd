"""The detectors: a file for each family, from the options (its hyper-parameters) to what it learns and finds."""
