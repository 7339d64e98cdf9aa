"""The application behind ``python -m bnlightning.train``."""
