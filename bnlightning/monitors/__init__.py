"""The monitors: plain torch, without a Trainer and without a logger. Each makes Records of what it measures."""
