"""The application: ``python -m bnlightning.train +experiment=tanh``."""

from bnlightning.experiments.command import main as main

if __name__ == "__main__":
    main()
