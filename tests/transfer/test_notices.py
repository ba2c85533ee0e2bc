"""What is said of a peer is said once."""

from __future__ import annotations

from logging import DEBUG, INFO, WARNING

from nvflare_rdma.transfer import Notices


def test_once_for_each_peer_and_reason():
    notices = Notices()
    said = [notices.level("received", peer, reason) for reason in "ab" for peer in ("x", "y") for _ in range(3)]
    assert said == [WARNING, DEBUG, DEBUG] * 4
    assert notices.level("sent", "x", "a", INFO) == INFO
    notices.clear()
    assert notices.level("received", "x", "a") == WARNING


def test_what_a_reason_has_anew_each_time_makes_no_other_reason():
    notices = Notices()
    assert notices.level("received", "x", "no way: 10.0.0.1:4711: nothing answered within 5 s") == WARNING
    later = "no way: 10.0.0.1:4712: nothing answered within 4 s (tried 3 s ago, and again in 57 s)"
    assert notices.level("received", "x", later) == DEBUG
    assert notices.level("received", "x", "no way: refused") == WARNING


def test_no_peer_makes_it_grow_without_end():
    notices = Notices()
    letters = [a + b + c for a in "abcdefghijklmnopqrstuvwxyz" for b in "abcdefghijklmnopqrstuvwxyz" for c in "abcdefg"]
    levels = [notices.level("received", peer, reason) for peer in ("x.a", "x.b") for reason in letters]
    assert levels.count(WARNING) == 64
    assert levels[-1] == DEBUG
    assert notices.level("received", "y", letters[-1]) == WARNING  # and takes no place of others
    notices.level("received", "z", "long" * 1_000_000)
    assert max(len(reason) for _, _, reason in notices._said) <= 200
