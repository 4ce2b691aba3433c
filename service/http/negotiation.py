"""Content negotiation: the header fields Accept and Accept-Encoding (RFC 9110, 12.5)."""

from __future__ import annotations

from functools import lru_cache

__all__ = ["best"]


@lru_cache(maxsize=64)
def best(header: bytes, offers: tuple[str, ...]) -> str | None:
    """Return the offer that a header prefers: by quality value, then by specificity, then by position.

    Args:
        header: The field's value, not empty.
        offers: Media types or codings in the server's order.

    Returns:
        One of the offers, or ``None`` if the client accepts none of them.

    Examples:
        >>> best(b"text/html, application/*;q=0.5", ("application/json",))
        'application/json'
        >>> best(b"*/*, application/json;q=0", ("application/json",)) is None
        True
    """
    named: dict[str, tuple[float, int]] = {}
    for position, item in enumerate(header.decode("latin-1").lower().split(",")):
        name, *parameters = (part.strip() for part in item.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        try:
            named.setdefault(name, (float(quality), -position))
        except ValueError:
            continue
    wanted: list[tuple[float, int, int, str]] = []
    for offer in offers:
        ranges = (offer, offer.partition("/")[0] + "/*", "*/*" if "/" in offer else "*")
        found = next(((2 - step, *named[name]) for step, name in enumerate(ranges) if name in named), None)
        if found is not None and found[1] > 0:
            exactness, q, place = found
            wanted.append((q, exactness, place, offer))
    return max(wanted, key=lambda entry: entry[:3])[3] if wanted else None
