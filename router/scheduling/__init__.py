"""Which worker does what, and what happens when it does not: sans-IO.

`Scheduler.handle(event, now)` is the only mutator; it returns commands. No clock, no randomness, no
sockets: `now` and `rng` are arguments, so the same object runs in production, in simulation and
under the model tests.
"""
