"""Moving KV blocks between workers: the port (`base`), the transports, and their choice (`select`).

Transports know memory and sockets; they know nothing of sequences, leases' rules or routers.
"""
