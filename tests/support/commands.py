"""What a command of `nvflare-rdma` says to a program."""

from __future__ import annotations

import json

from nvflare_rdma.cli import main


def told(capsys, *words) -> tuple[int, dict]:
    """Run a command in this process; its exit status, and the envelope on stdout."""
    code = main([*(str(word) for word in words), "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def error_of(code: int, answer: dict) -> tuple[str, str]:
    """The code and the message of an error, which has a hint, and takes one line."""
    assert (code, answer["status"]) == (1, "error")
    assert answer["hint"]
    assert "\n" not in answer["message"]
    return answer["error_code"], answer["message"]
