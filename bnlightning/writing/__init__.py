"""From records to loggers and pictures."""
