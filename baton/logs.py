"""Log lines as text or JSON, on standard error: one event per line, never per token."""

import logging
import sys
from datetime import UTC, datetime
from typing import TextIO

import msgspec


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def log_handler(stream: TextIO, log_format: str) -> logging.Handler:
    handler = logging.StreamHandler(stream)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(
            logging.Formatter(
                "%(asctime)s.%(msecs)03d %(levelname)s %(name)s %(message)s", "%H:%M:%S"
            )
        )
    return handler


def set_up_logs(level: str, log_format: str) -> None:
    """Call once, first thing in the process."""
    handler = log_handler(sys.stderr, log_format)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # These libraries log each retry with a traceback; we say what matters ourselves.
    for noisy in ("nats", "asyncio", "aiohttp", "grpc"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
