"""Writes docs/configuration.md from the settings structs. `--check` only compares."""

import argparse
import sys
from pathlib import Path

import msgspec

from baton.settings import shown_default, unwrapped
from protocol.settings import ProcessSettings
from router.config import RouterConfig
from worker.config import WorkerConfig

TARGET = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """\
# Configuration

Every setting has one name: `stall_timeout_ms` in a YAML file (`--config F`), `--stall-timeout-ms`
as a flag, `BATON_STALL_TIMEOUT_MS` in the environment. Flags win over the environment, the
environment over the file. An unknown name in a file is an error that suggests the nearest one; an
unknown variable is said and ignored (orchestrators inject such names). Times are milliseconds.
What each deadline does is in [deadlines.md](deadlines.md), what moves KV and which names of
TensorRT-LLM a worker's file may have in [transfers.md](transfers.md).

`baton up` passes settings on: `--set router.stall_timeout_ms=3000`, `--set worker.lease_ms=3000`
(all workers), `--set decode.max_running=8` (those of one role), `--set decode-1.max_running=8`
(one worker).

This page is generated: `python scripts/write_settings_doc.py`.
"""


def table(config: type[ProcessSettings], without: frozenset[str]) -> str:
    rows = ["| setting | default | |", "|---|---|---|"]
    for field in msgspec.structs.fields(config):
        if field.name in without:
            continue
        _, text = unwrapped(field.type)
        rows.append(f"| `{field.name}` | {shown_default(field)} | {text} |")
    return "\n".join(rows)


def document() -> str:
    common = frozenset(field.name for field in msgspec.structs.fields(ProcessSettings))
    parts = [
        HEAD,
        "## Every process\n\n" + table(ProcessSettings, frozenset()) + "\n",
        "## `baton router`\n\n" + table(RouterConfig, common) + "\n",
        "## `baton worker`\n\n" + table(WorkerConfig, common) + "\n",
    ]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is out of date")
    args = parser.parse_args()
    text = document()
    if args.check:
        return 0 if TARGET.read_text() == text else 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
