"""Finished runs compared: tables and figures."""
