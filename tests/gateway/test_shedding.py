"""The order in which connections are closed when memory is short."""

from dataclasses import dataclass

import pytest

from whaled.gateway.phase import Phase
from whaled.gateway.shedding import to_shed


@dataclass(eq=False)
class Client:
    """A connection in the eyes of shedding."""

    connected_at: float = 0.0
    unsent: int = 0
    is_client: bool = True
    phase: Phase = Phase.READY
    progress: tuple[bool, bool] = (True, True)


def stranger(*progress: bool) -> Client:
    return Client(is_client=False, phase=Phase.REQUESTING, progress=(progress[0], progress[1]))


@pytest.mark.parametrize("is_urgent", [False, True])
def test_unauthenticated_connections_go_first_and_one_stage_at_a_time(is_urgent: bool) -> None:
    in_tls, in_http, silent = stranger(False, False), stranger(True, False), stranger(True, True)
    slow = Client(unsent=10)
    for left in ([silent, in_http, in_tls], [silent, in_http], [silent]):
        shed = to_shed([slow, *left], 5, is_urgent=is_urgent)
        assert shed.strangers == left[-1:]
        assert list(shed.slow) == ([slow] if is_urgent else [])


def test_clients_with_the_most_unsent_bytes_are_cut_off_until_enough_is_free() -> None:
    clients = [Client(unsent=size) for size in (5, 0, 100, 50, 1)]
    assert to_shed(clients, 120, is_urgent=True).slow == [clients[2], clients[3]]
    assert to_shed(clients, 10_000, is_urgent=False) == ([], [clients[2], clients[3], clients[0], clients[4]], ())


def test_only_if_it_is_urgent_a_part_of_the_others_is_closed_newest_first_and_each_once() -> None:
    clients = [Client(connected_at=float(number)) for number in range(40)]
    clients[39].unsent = 5
    clients[38].phase = Phase.CLOSING
    assert to_shed(clients, 1000, is_urgent=False).others == ()
    shed = to_shed(clients, 1000, is_urgent=True)
    assert shed.slow == [clients[39]]
    assert shed.others == [clients[37], clients[36]]


def test_an_unauthenticated_connection_with_unsent_bytes_is_closed_once() -> None:
    refused = stranger(True, False)
    refused.unsent = 10
    shed = to_shed([refused, Client(unsent=3)], 100, is_urgent=True)
    assert (shed.strangers, len(shed.slow)) == ([refused], 1)
