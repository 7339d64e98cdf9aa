"""Counting what was caught: accumulators, histograms, and the reduction over ranks."""
