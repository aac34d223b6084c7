"""KV blocks: `arena` is the memory they live in, `pool` says which are free and who holds the rest.

The two do not know each other: the pool counts references to block numbers, the arena holds bytes.
"""
