"""Data sets, each a function that returns tensors or a data set and says what it needs."""
