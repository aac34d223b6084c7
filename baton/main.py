"""The `baton` command line."""

import argparse
import gc
import logging
import os
import sys
from collections.abc import Sequence

from baton.logs import set_up_logs
from baton.run import complain, run_process
from baton.settings import add_flags, load_settings
from protocol.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    gc.disable()  # a tenth of the start is looking for garbage in what is being imported
    given = sys.argv[1:] if argv is None else list(argv)
    args = _parser(given[:1]).parse_args(given)
    try:
        return _COMMANDS[args.command](args)
    except ConfigError as error:
        return complain(error)


def _parser(wanted: Sequence[str]) -> argparse.ArgumentParser:
    """What a command needs is imported for it alone: `baton up` and routers start at once."""
    parser = argparse.ArgumentParser(
        prog="baton",
        description="Serve large language models with prefill and decode on separate workers.",
    )
    parser.add_argument("--version", action="version", version=_version(wanted))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands.add_parser("up", help="everything on this machine, ready to ask"))
    router = commands.add_parser("router", help="one router process")
    if "router" in wanted:
        from router.config import RouterConfig

        add_flags(router, RouterConfig)
        for flag in ("--listen-fds", "--line-fd"):  # a parent's to its children
            router.add_argument(flag, default="", help=argparse.SUPPRESS)
        router.add_argument("--successor", action="store_true", help=argparse.SUPPRESS)
    worker = commands.add_parser("worker", help="one worker process")
    if "worker" in wanted:
        from worker.config import WorkerConfig

        add_flags(worker, WorkerConfig)
    bench = commands.add_parser("bench", help="CPU per token and per request; pace of KV transfers")
    if "bench" in wanted:
        from baton.bench.command import add_arguments

        add_arguments(bench)
    return parser


def _version(wanted: Sequence[str]) -> str:
    if "--version" not in wanted:
        return ""  # looking for it takes a twentieth of a router's start
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"baton {version('baton-serve')}"
    except PackageNotFoundError:
        return "baton 0+unknown"


def _add_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR", help="model folder; default: demo")
    parser.add_argument("--prefill", type=int, default=1, metavar="N", help="prefill workers (1)")
    parser.add_argument("--decode", type=int, default=1, metavar="N", help="decode workers (1)")
    parser.add_argument(
        "--both", type=int, default=0, metavar="N", help="workers of both roles (0)"
    )
    parser.add_argument(
        "--engine", choices=["torch", "simulated"], default="torch", help="what computes (torch)"
    )
    parser.add_argument(
        "--transfer",
        choices=["auto", "nixl", "ucx", "shm", "tcp"],
        default="auto",
        help="how KV moves (auto: the best that two workers have in common)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="where the router listens (127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=8000, help="of the router (8000); 0: any free one"
    )
    parser.add_argument(
        "--state-dir",
        default="",
        metavar="D",
        help="logs, data, processes.json (a new temporary folder)",
    )
    parser.add_argument(
        "--log-level",
        choices=["debug", "info", "warning", "error"],
        default="info",
        help="how much to log (info)",
    )
    parser.add_argument(
        "--log-format", choices=["text", "json"], default="text", help="of all processes (text)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="ROLE.NAME=VALUE",
        help="a setting for router or workers, e.g. router.stall_timeout_ms=3000, "
        "prefill.max_running=4, decode-1.max_running=2 (one worker), worker.lease_ms=3000 (all "
        "workers); repeatable",
    )


def _up(args: argparse.Namespace) -> int:
    from baton.up import UpOptions, run_up

    set_up_logs(args.log_level, args.log_format)
    options = UpOptions.of(args)
    return run_process(lambda stop, stop_now: run_up(options, stop, stop_now))


def _router(args: argparse.Namespace) -> int:
    from router.config import RouterConfig

    config = load_settings(RouterConfig, args, os.environ)
    set_up_logs(config.log_level, config.log_format)
    if config.processes:
        from router.parent import run_parent

        return run_process(lambda stop, now: run_parent(config, sys.argv[1:], stop, now))
    from prometheus_client import disable_created_metrics

    from router.inherited import FAMILY_DIR, Inherited
    from router.main import run_router

    inherited = None
    if args.listen_fds:
        inherited = Inherited.of(
            args.listen_fds,
            args.line_fd,
            is_successor=args.successor,
            folder=os.environ.get(FAMILY_DIR, ""),
        )
    disable_created_metrics()  # type: ignore[no-untyped-call]
    return run_process(lambda stop, now: run_router(config, stop, now, inherited))


def _worker(args: argparse.Namespace) -> int:
    from prometheus_client import disable_created_metrics

    from baton.demo import with_model
    from worker.config import WorkerConfig
    from worker.main import run_worker
    from worker.trtllm_config import TrtllmKeys

    foreign = TrtllmKeys(WorkerConfig.__struct_fields__)
    config = with_model(load_settings(WorkerConfig, args, os.environ, foreign))
    disable_created_metrics()  # type: ignore[no-untyped-call]
    set_up_logs(config.log_level, config.log_format)
    for note in foreign.notes:
        logging.getLogger("baton.worker").info("%s", note)
    return run_process(lambda stop, stop_now: run_worker(config, stop, stop_now))


def _bench(args: argparse.Namespace) -> int:
    from baton.bench.command import run_bench

    return run_process(lambda stop, _: run_bench(args, stop))


_COMMANDS = {"up": _up, "router": _router, "worker": _worker, "bench": _bench}
