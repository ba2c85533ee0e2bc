"""One word means one thing in the log, as in the glossary."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "nvflare_rdma"
#: What a log line calls the fallback, and what it does not.
RIGHT, WRONG = "FLARE's own path", ("default path", "default way", "the fallback")
LEVELS = {"debug", "info", "warning", "error", "exception", "log", "log_info", "log_warning", "log_error"}


def logged(path: Path) -> list[str]:
    """The texts of the log lines in a module."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in LEVELS]
    constants = [node for call in calls for node in ast.walk(call) if isinstance(node, ast.Constant)]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_log_lines_call_the_fallback_by_one_name():
    texts = [(path, text) for path in PACKAGE.rglob("*.py") for text in logged(path)]
    assert sum(RIGHT in text for _, text in texts) > 3
    assert [(path.name, text) for path, text in texts if any(wrong in text for wrong in WRONG)] == []
