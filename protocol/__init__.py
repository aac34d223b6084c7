"""What is said on the wire between router, workers and clients, and the bus that carries it."""
