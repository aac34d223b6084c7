"""Decides and streams: HTTP and NATS front, scheduler, streams."""
