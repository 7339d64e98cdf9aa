"""What is measured: plain torch, without a Trainer and without a logger."""
