"""What an operator can set for a worker; built and validated in `main`, passed down as values."""
