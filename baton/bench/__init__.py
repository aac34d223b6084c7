"""`baton bench`: what a token, a request, a block and a step cost, beside the floors under them.

`command` is the command line. `tokens`, `requests` and `latency` load a fleet of real processes
(`fleet`) with a client that costs little (`client`); their floor is the same client against a
server that only writes (`canned`). `scheduler` feeds the scheduler alone, `paths` a router without
sockets (`router_alone`, `pretend_workers`). `transfer` and `engine` need no fleet.
"""
