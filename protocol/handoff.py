"""`KvHandle`: the permission and the address to fetch KV blocks from the worker that computed them.

The router carries a handle from the prefill worker to the decode worker and never looks inside the
offers. A handle is addressed to nobody: if one decode worker dies, the same handle goes to another.
"""

import msgspec


class ShmOffer(msgspec.Struct, tag="shm", array_like=True, frozen=True):
    """Memory of a process on the same host, reached through `/proc/<pid>/fd`."""

    boot_id: str
    """The kernel's boot id and pid namespace: says whether sink and source share a host."""
    pid: int
    arena_fd: int
    lease_fd: int
    arena_bytes: int
    lease_bytes: int
    token: str
    """Written at a fixed place of the lease table's memory; a recycled pid does not have it."""
    machine: str = "x86_64"


class TcpOffer(msgspec.Struct, tag="tcp", array_like=True, frozen=True):
    """A plain socket of the source; the lease's nonce authenticates the reader."""

    host: str
    port: int


class FabricOffer(msgspec.Struct, tag="fabric", array_like=True, frozen=True):
    """A registered memory of a fabric library (NIXL, UCX): opaque metadata and base addresses."""

    backend: str
    agent: str
    metadata: bytes
    arena_address: int
    lease_address: int
    device: int = 0
    port: int = 0
    host: str = ""
    host_id: str = ""
    """Kernel's boot id and pid namespace of the source, as in `ShmOffer.boot_id`."""
    pid: int = 0
    """With `host_id`: whose memory a sink on the same host can try to read. 0: not said."""
    arena_bytes: int = 0
    lease_bytes: int = 0
    kind: str = "host"
    """Where the arena lies: "host" or "cuda" (then `device` is the GPU's number)."""
    token: str = ""
    """The lease table's last bytes, as in `ShmOffer`: what a sink that tries to read our memory
    must find there. Empty: the library would not read directly here, nothing is to be tried."""
    rdma: bool = False
    """The source has an active RDMA port."""


Offer = ShmOffer | TcpOffer | FabricOffer


class RankKv(msgspec.Struct, array_like=True, frozen=True):
    """What one tensor-parallel rank of the source lends."""

    blocks: bytes
    """Block numbers in the source's arena, in sequence order, packed 32-bit."""
    slot: int
    """The lease's slot in the source's lease table."""
    nonce: int
    """What the slot's 64-bit word holds while the lease lives; never zero."""
    offers: list[Offer]


class KvHandle(msgspec.Struct, array_like=True, frozen=True):
    """KV of `num_tokens` tokens, lent by `worker` under a lease."""

    handle_id: str
    worker: str
    incarnation: str
    num_tokens: int
    block_size: int
    content_hash: bytes
    lease_s: float
    """The source keeps the blocks this long after the last renewal."""
    ranks: list[RankKv]
    opaque: msgspec.Raw = msgspec.Raw(b"\xc0")
    """An external engine's own handle, carried unread (msgpack)."""
