"""Who asks: by the address at the other end of the connection, which no header can change."""

import re
from collections.abc import Mapping
from typing import Any

from pipeline.serving.ports import is_loopback

FORWARDED = re.compile(r"^(forwarded|via|x-forwarded.*|x-real-ip|(.*-)?client-ip|.*-connecting-ip)$")


def stranger(client: Any, headers: Mapping[str, str]) -> str | None:
    """Why a request is not one of this machine's own, or None.

    It is not where its peer is another machine; where a proxy on this machine says that it stands for somebody; and
    where the name it asks for is not this machine's, as that of a page is that rebinds its name to 127.0.0.1. Headers
    can only take trust away.

    client: (address, port) as the server saw it, None where it saw none.
    """
    address = str(client[0]) if client else "an unknown address"
    if not client or not is_loopback(address):
        return f"the endpoint has no keys and answers its own machine alone, not {address}"
    through = next((name for name in headers if FORWARDED.match(name)), None)
    if through is not None:
        return f"the endpoint has no keys and answers its own machine alone, not a proxy (header '{through[:64]}')"
    host = headers.get("host", "")
    if not is_loopback(re.sub(r":\d+$", "", host)):
        return f"host '{host[:64]}' is not served"
    return None
