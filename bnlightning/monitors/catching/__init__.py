"""Catching tensors: hooks, compiled graphs, and which modules are looked at."""
