"""From what a reader found to annotations that can be trained on; what is left out is counted and reported."""
