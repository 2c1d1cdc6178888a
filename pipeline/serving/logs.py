"""Structured logs: one JSON object a line on stderr, each with the trace id that the answer names."""

import json
import logging
import sys
from datetime import UTC, datetime

FIELDS = "fields"  # of a record: what its line says beside the message


class JsonLines(logging.Formatter):
    """time (UTC, ISO 8601), level, logger, message, what the record's `fields` hold, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def to_stderr(level: int = logging.INFO) -> None:
    """Send this package's log to stderr, from where a platform collects it. For processes that serve."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("raydiffusion")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
