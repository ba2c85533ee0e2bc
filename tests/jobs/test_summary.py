from __future__ import annotations

from traffic.summary import RoundTraffic, summarize


def test_server_time_is_not_moving_time():
    lines = [
        {"kind": "bytes", "round": None, "sent": 5, "received": 6},
        {"kind": "serve", "round": 0, "site": "a", "seconds": {"encode": 0.5}},
        {"kind": "serve", "round": 0, "site": "a", "seconds": {"decode": 0.25}},
        {"kind": "serve", "round": 0, "site": "a", "seconds": {"accept": 0.25}},
        {
            "kind": "task",
            "round": 0,
            "site": "a",
            "seconds": {"pull": 2.0, "send": 1.5, "decode": 1, "encode": 2},
        },
        {"kind": "bytes", "round": 0, "sent": 100, "received": 200},
    ]
    traffic = summarize(lines)
    assert traffic.rounds == (RoundTraffic(0, 100, 200, 1.5, 1.0, 3.75),)
    assert (traffic.outside_down, traffic.outside_up) == (5, 6)


def test_seconds_are_means_over_sites():
    lines = [{"kind": "bytes", "round": 3, "sent": 1, "received": 2}]
    lines += [
        {"kind": "task", "round": 3, "site": s, "seconds": {"pull": p, "send": 1.0}}
        for s, p in (("a", 1.0), ("b", 3.0))
    ]
    (row,) = summarize(lines).rounds
    assert (row.round, row.seconds_down, row.seconds_up, row.seconds_codec) == (3, 2.0, 1.0, 0.0)


def test_a_round_without_sites_has_bytes():
    (row,) = summarize([{"kind": "bytes", "round": 0, "sent": 1, "received": 2}]).rounds
    assert row == RoundTraffic(0, 1, 2, 0.0, 0.0, 0.0)
