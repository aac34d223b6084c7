"""Does the work: jobs, engines, KV pool, hand-off, transfers."""
