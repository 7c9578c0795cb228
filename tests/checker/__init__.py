"""What people see, judged by the promises of docs/reference/protocol.md: one checker for simulation, ordeals and benchmarks.

`Client` is the model of a client: feed it the frames that a connection brings. `Ledger` is what publishers did, with
texts that carry `mark`s. `judge` compares the two and returns every `Violation`. Nothing here does I/O or reads a clock.

    ledger = Ledger()
    said = ledger.ask("project", "chat_message", "now", key="ada", at=now)       # before the publish
    ...publish {"type": "chat_message", "role": "user", "content": said.mark}
    said.told(now, "published")                                                  # or "refused", or "unknown"

    client = Client("viewer-1", user="ada")
    client.opened(now, since=client.since())                                     # the connection stands
    for answer in client.take(frame, now): ...send it
    client.closed(now)

    assert judge(ledger, [client], ended=now) == []
"""

from tests.checker.client import Client
from tests.checker.ledger import Ledger, Publication, marks
from tests.checker.verdict import Violation, judge

__all__ = ["Client", "Ledger", "Publication", "Violation", "judge", "marks"]
