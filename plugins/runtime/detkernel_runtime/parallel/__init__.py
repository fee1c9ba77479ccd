"""Several processes of one run: how they are started, meet, train side by side, and end."""
