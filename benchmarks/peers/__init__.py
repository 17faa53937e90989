"""The other ways to read and change activations; nothing in here imports tracelens, so that each runs by itself."""
