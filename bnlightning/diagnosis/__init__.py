"""From records to what is wrong with a training."""
