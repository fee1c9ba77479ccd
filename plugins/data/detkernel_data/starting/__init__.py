"""From a folder to a config: what there is, how it is split, what to train on it."""
