"""Which priors are to predict which objects."""
