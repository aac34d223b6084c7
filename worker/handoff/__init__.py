"""The hand-off of KV blocks between two workers, as two machines without I/O.

`source` lends blocks under leases, `sink` borrows them and checks that they were still lent after
the last byte was read. `ends` is what transports report. Time is an argument, memory and transfers
are somebody else's: nothing here waits, reads a clock or draws a random number.
"""
