"""Training steps of methods that are more than attack, forwards, loss: one a file."""
