"""`python -m tests.chaos`: the rows, their table, and a JSON file of it."""

import argparse
import fnmatch
import signal
import sys
from pathlib import Path

from tests.chaos.rows import ROWS, Row
from tests.chaos.runner import Runner, table, write_json
from tests.chaos.world import TRANSPORTS


def chosen(patterns: str) -> list[Row]:
    """By comma-separated shell patterns; a bare word stands anywhere in a name."""
    wanted = [p if set(p) & set("*?[") else f"*{p}*" for p in patterns.split(",") if p]
    rows = [r for r in ROWS if not wanted or any(fnmatch.fnmatch(r.name, p) for p in wanted)]
    if not rows:
        sys.exit(f"no row is called {patterns!r}; --list says which there are")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--transport", default="shm", help=f"comma-separated: {TRANSPORTS}")
    parser.add_argument("--rows", default="", help="comma-separated patterns; empty: all")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--keep", type=Path, help="folder in which logs stay")
    parser.add_argument("--list", action="store_true", help="only say which rows there are")
    args = parser.parse_args()
    rows = chosen(args.rows)
    transports = args.transport.split(",")
    unknown = set(transports) - set(TRANSPORTS)
    if unknown:
        parser.error(f"no such transport: {', '.join(sorted(unknown))}")
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    done = []
    stopped = False
    for transport in transports:
        runner = Runner(transport, sys.stdout, args.keep)
        try:
            runner.run([row for row in rows if transport in row.transports])
        except KeyboardInterrupt:
            stopped = True
        done += runner.done
        if stopped:
            break
    print("\n" + table(done))
    if args.json is not None:
        write_json(args.json, done)
    return 130 if stopped else int(any(found["verdict"] != "ok" for found in done))


if __name__ == "__main__":
    sys.exit(main())
