"""What computes: the port (`base`), our own engine (`core`, `stepper`, `runner`), and vLLM."""
