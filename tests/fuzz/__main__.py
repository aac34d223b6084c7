"""`python -m tests.fuzz --seconds N --seed S --only NAME`: a table; exit 1 if anything is bad."""

import argparse
import faulthandler
import sys

from tests.fuzz.running import fuzz, select


def main() -> int:
    faulthandler.enable()  # a library that ends the process shows where
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="words of decoders' names")
    args = parser.parse_args()
    chosen = select(args.only)
    if not chosen:
        print(f"no decoder is named {args.only!r}", file=sys.stderr)
        return 2
    head = ("decoder", "inputs", "accepted", "refused", "bad", "us each", "slowest ms")
    print("{:28} {:>9} {:>9} {:>9} {:>6} {:>8} {:>10}".format(*head), flush=True)
    num_bad = 0
    for decoder in chosen:
        result = fuzz(decoder, seed=args.seed, seconds=args.seconds / len(chosen))
        bad = sum(result.kinds.values())
        num_bad += bad
        each = 1e6 * result.seconds / max(1, result.inputs)
        print(
            f"{result.name:28} {result.inputs:9} {result.accepted:9} {result.refused:9} {bad:6} "
            f"{each:8.1f} {1e3 * result.slowest_s:10.1f}",
            flush=True,
        )
        for problem, data in result.bad:
            print(f"    {problem[:200]}\n    {data[:160]!r}", flush=True)
    return 1 if num_bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
