"""Who may send, and who may receive."""

from router.envelope import Envelope
from router.errors import Denied, Refused
from router.pipeline import Forward

__all__ = ["check_permission"]


async def check_permission(envelope: Envelope, forward: Forward) -> None:
    """Inbound: the sender must hold the grant that the type's policy asks for. Outbound: only holders receive it.

    Outbound it describes the crowd instead of walking it; the hub compares grants once per group of equals.
    """
    policy = envelope.policy
    if envelope.leg == "outbound":
        await forward(envelope.narrowed(holding=policy.receive))
        return
    if policy.send is None:
        raise Refused(f"`{envelope.type}` is published by backends; clients cannot send it", code="denied")
    if envelope.sender is None or policy.send not in envelope.sender.grants:
        raise Denied(policy.send)
    await forward(envelope)
