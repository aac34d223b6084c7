"""Who is alive: the registry port, its etcd adapter and its in-memory twin."""
