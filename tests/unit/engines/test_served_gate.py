"""The gate before a server: one thread acts on a failure, and only on that of the server as it is."""

from __future__ import annotations

from paceline.engines.served.gate import Gate


def test_a_failure_of_an_earlier_server_is_acted_on_by_nobody() -> None:
    """Two requests fail with the same server; it was replaced and found ready when the second tells of it."""
    acts: list[str] = []
    gate = Gate(
        lambda _: acts.append("checked"),
        where="here",
        patience_s=1.0,
        should_stop=lambda: False,
        report=lambda *_, **__: None,
    )
    ticket = gate.enter()
    for name in ("first", "second"):
        gate.wait(ticket, "no answer", lambda name=name: acts.append(name))
    assert acts == ["checked", "first", "checked"]
