import json

import pytest

from kit.raw import payload
from whaled.gateway.framing import payload_of, text_frame


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 200_000])
def test_a_frame_header_has_the_length(size: int) -> None:
    body = json.dumps("x" * size).encode()
    assert payload(text_frame(body)) == "x" * size
    assert payload_of(text_frame(body)) == body
