"""The engine that drives a vLLM server beside this process through its own HTTP protocol.

vLLM owns the KV, the batches and the transfers; this package owns what Baton promises about them:
which prompt a handle belongs to, how long it may be used, when a choice ends, what is cached.
"""
