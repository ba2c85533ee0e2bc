"""Which tests `make test-verbs` leaves to `make test-verbs-all`: parametrizations that show the same once more.

A test that is not listed here runs with all its parametrizations, so that a new test runs before anyone thinks of
this file. What is listed runs as said here: one of each kind over soft-RoCE (rxe) and over soft-iWARP (siw) where the
device decides what happens, and over one of them where this package's own code does. Over both, the parametrizations
are not the same ones: together they have each value of each parameter that matters.
"""

from __future__ import annotations

from collections.abc import Sequence

CHOSEN: dict[str, Sequence[str]] = {
    # The smallest and the largest write, and those about the size from which a source is registered where it is; each
    # kind of buffer, with a checksum and without.
    "tests/verbs/test_fabric.py::test_a_write_lands_in_the_exposed_slice_and_nowhere_else": (
        "RoCE-bytes-1-0",
        "RoCE-memoryview-524287-18446744073709551615",
        "RoCE-bytearray-3145733-0",
        "iWARP-bytearray-4095-18446744073709551615",
        "iWARP-memoryview-524288-0",
        "iWARP-bytes-3145733-18446744073709551615",
    ),
    "tests/verbs/test_fabric.py::test_a_write_outside_of_what_is_granted_is_refused_by_the_device": (
        "RoCE-beyond the end",
        "iWARP-another key",
    ),
    # What the endpoint does by itself, whatever carries its messages.
    "tests/verbs/test_fabric.py::test_an_exposure_is_answered_with_nothing": ("iWARP",),
    "tests/verbs/test_fabric.py::test_a_device_that_carries_little_at_once_gets_chains_of_requests": ("RoCE",),
    "tests/verbs/test_fabric.py::test_a_source_that_spans_registrations": ("RoCE",),
    "tests/verbs/test_fabric.py::test_a_grant_of_what_can_not_be_is_a_violation": ("0-18446744073709451616",),
    "tests/verbs/test_fabric.py::test_an_answer_to_nothing_is_a_violation": ("RoCE",),
    "tests/verbs/test_fabric.py::test_an_answer_over_another_rail_is_a_violation": ("iWARP",),
    "tests/verbs/test_fabric.py::test_a_late_write_to_a_revoked_slice_is_still_reported": ("RoCE",),
    "tests/verbs/test_fabric.py::test_an_exposure_while_its_rail_ends_crashes_nothing": ("RoCE",),
    "tests/verbs/test_fabric.py::test_nothing_is_exposed_over_a_rail_that_was_never_opened": ("RoCE",),
    "tests/verbs/test_fabric.py::test_a_closed_endpoint_writes_nothing_and_says_so": ("iWARP",),
    "tests/verbs/test_fabric.py::test_a_write_that_is_too_long_for_its_slice_is_this_sides_mistake": ("RoCE",),
    # The same protection domain on either kind: who may write is told apart by key.
    "tests/verbs/test_fabric.py::test_the_key_of_one_peer_is_of_no_use_to_another": ("RoCE",),
    "tests/verbs/test_fabric.py::test_no_key_outlives_the_rail_that_it_was_granted_over": ("iWARP",),
    # Over iWARP there is librdmacm besides, with descriptors and threads of its own.
    "tests/verbs/test_fabric.py::test_an_endpoint_that_lacks_descriptors_leaves_nothing_open": ("iWARP",),
    "tests/verbs/test_fabric.py::test_a_forked_process_that_ends_closes_nothing_of_its_parent": ("iWARP",),
    "tests/verbs/test_fabric.py::test_an_endpoint_is_closed_by_several_threads_at_once": ("iWARP",),
    "tests/verbs/test_fabric.py::test_the_interpreter_ends_with_endpoints_open": ("iWARP",),
    # Either direction, and either end, once.
    "tests/verbs/test_faults.py::test_a_queue_pair_in_the_error_state_is_rebuilt_and_the_transfer_resumes": (
        "there-verbs",
        "back-verbs-iwarp",
    ),
    "tests/verbs/test_faults.py::test_a_link_that_is_down_for_two_seconds": ("there",),
    "tests/verbs/test_faults.py::test_a_device_that_is_removed_leaves_tcp": ("there-passive", "back-active"),
    "tests/verbs/test_faults.py::test_a_peer_that_is_killed": ("receiver-verbs", "sender-verbs-iwarp"),
    "tests/verbs/test_guest.py::test_what_a_test_broke_is_restored": ("link deleted", "nothing gets through"),
    "tests/verbs/test_iwarp.py::test_an_unknown_ticket_is_refused_and_the_right_one_is_taken_afterwards": ("ones",),
    # One that says nothing, one that speaks another protocol, one that the device lets in, and one that lies.
    "tests/verbs/test_iwarp.py::test_a_stranger_gets_nowhere_and_stops_nobody": (
        "nothing",
        "noise",
        "little private data",
        "more than there is",
    ),
    # The links are those that the conformance tests have; two more programs take their time to start there.
    "tests/verbs/test_bench.py::test_verbs_are_measured_between_two_devices": (),
    # In the clear over one kind and with TLS over the other; where the channel alone decides, once.
    "tests/conformance/test_fabrics.py::test_messages_of_all_sizes_in_both_directions": (
        "verbs-clear",
        "verbs-iwarp-secure",
    ),
    "tests/conformance/test_fabrics.py::test_a_gibibyte_in_both_directions_at_once": (
        "verbs-secure",
        "verbs-iwarp-clear",
    ),
    "tests/conformance/test_fabrics.py::test_32_transfers_at_once_in_both_directions": (
        "verbs-clear",
        "verbs-iwarp-secure",
    ),
    "tests/conformance/test_fabrics.py::test_either_side_can_give_up_what_it_sends": (
        "verbs-secure",
        "verbs-iwarp-clear",
    ),
    "tests/conformance/test_fabrics.py::test_either_side_can_give_up_what_it_receives": (
        "verbs-clear",
        "verbs-iwarp-secure",
    ),
    "tests/conformance/test_fabrics.py::test_a_message_larger_than_the_budget": ("verbs-secure",),
    "tests/conformance/test_fabrics.py::test_what_is_known_by_a_label_lands_in_its_place": (
        "verbs-secure",
        "verbs-iwarp-clear",
    ),
    "tests/conformance/test_fabrics.py::test_what_nobody_waits_for_or_can_use_is_refused": ("verbs-clear",),
}


def chosen(collected: Sequence[str]) -> list[str]:
    """Those of ``collected`` that `make test-verbs` runs, in the same order.

    Raises:
        ValueError: a test or a parametrization of `CHOSEN` is not there, so that what it stood for would not run.
    """
    wanted = {f"{test}[{each}]" for test, parameters in CHOSEN.items() for each in parameters}
    if gone := sorted(wanted.difference(collected)):
        raise ValueError(f"tests/guest/selection.py names what is no test (any more): {', '.join(gone)}")
    return [test for test in collected if test in wanted or test.partition("[")[0] not in CHOSEN]
