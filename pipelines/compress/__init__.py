"""Compression: training, distilling, pruning and sharing, each step a model in and a model out; and certifying what
somebody else compressed."""
