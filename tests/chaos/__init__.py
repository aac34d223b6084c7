"""Breaking real processes and looking at what is left: `python -m tests.chaos`."""
