"""The one command: `baton up | router | worker`."""
