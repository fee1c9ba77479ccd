"""What is odd about the data of a config, found before it is trained on."""
