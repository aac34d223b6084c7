"""What the etcd adapter does without a server."""

import os
import subprocess
import sys

import pytest

from discovery.etcd import EtcdConfig, prefix_end
from discovery.etcd_config import split_endpoint


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("http://h:1", (False, "h:1")),
        ("https://h:1/", (True, "h:1")),
        ("h:1", (False, "h:1")),
        ("http://h", (False, "h:2379")),
        ("http://[::1]:5", (False, "[::1]:5")),
        ("http://[::1]", (False, "[::1]:2379")),
    ],
)
def test_end_points_are_split(endpoint: str, expected: tuple[bool, str]) -> None:
    assert split_endpoint(endpoint) == expected


@pytest.mark.parametrize("endpoint", ["", "ftp://h:1", "http://", "http://h:1/path"])
def test_unfit_end_points_are_refused(endpoint: str) -> None:
    with pytest.raises(ValueError, match="endpoint"):
        EtcdConfig([endpoint])


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="endpoint"):
        EtcdConfig([])
    with pytest.raises(ValueError, match="cert and key"):
        EtcdConfig(["h:1"], cert="c")
    with pytest.raises(ValueError, match="username"):
        EtcdConfig(["h:1"], password="p")
    with pytest.raises(ValueError, match="positive"):
        EtcdConfig(["h:1"], probe_s=0)


def test_settings_do_not_print_the_password() -> None:
    assert "secret" not in repr(EtcdConfig(["h:1"], username="u", password="secret"))


def test_prefix_end_is_the_first_key_behind_the_prefix() -> None:
    assert prefix_end("/baton/n/workers/") == b"/baton/n/workers0"


def test_importing_the_adapter_leaves_the_environment_alone() -> None:
    code = (
        "import os; before = dict(os.environ); import discovery.etcd; "
        "assert dict(os.environ) == before; "
        "from discovery import etcd_pb2 as pb; from google import protobuf; "
        "r = pb.RangeRequest.FromString(pb.RangeRequest(key=b'k').SerializeToString()); "
        "assert r.key == b'k', protobuf.__version__"
    )
    env = {k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=30)
