"""Which network addresses a client's URL may lead to. Pure; used by the fetcher before it dials.

The question is asked of an address: names can be made to mean anything. Only for a proxy, which
does the resolving, it can be asked of a name, and the answer is worth less.
"""

import ipaddress
import re

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# What Python's own table of special networks does not hold, or not in every version.
_REFUSED = tuple(
    map(
        ipaddress.ip_network,
        (
            "168.63.129.16/32",  # Azure's platform endpoint inside every virtual machine
            "192.0.0.0/24",  # protocol assignments; Oracle's cloud has its metadata here
            "192.88.99.0/24",  # 6to4 relays
            "3fff::/20",  # documentation
        ),
    )
)
_ASSIGNED_V6 = ipaddress.IPv6Network("2000::/3")  # all there is of the public internet
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = {0x00005EFE, 0x02005EFE}  # above the IPv4 address that ends such an address, RFC 5214

# A name that may be public: one with a dot, that no parser takes for a number, and under no
# suffix that is kept for private networks (RFC 6761, 6762 and 8375, and ICANN's .internal).
_PUBLIC_NAME = re.compile(
    r"(?:[a-z0-9_-]+\.)+"
    r"(?!(?:arpa|corp|home|internal|intranet|lan|local|localdomain|localhost|private)$)"
    r"[a-z][a-z0-9-]*"
)


def is_public(address: Address) -> bool:
    """Whether the address is a unicast address on the public internet.

    IPv6 addresses that carry an IPv4 address (mapped, NAT64, 6to4, ISATAP) are judged by that
    one; Teredo and everything outside the assigned public space is refused.
    """
    if isinstance(address, ipaddress.IPv6Address):
        last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if int(address) >> 32 & 0xFFFFFFFF in _ISATAP and not is_public(last):
            return False
        inner = last if address in _NAT64 else address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None or address not in _ASSIGNED_V6:
            return False
    special = any(address in network for network in _REFUSED)
    return address.is_global and not address.is_multicast and not special


def is_public_host(host: str) -> bool:
    """What can be told of a host in lower case without resolving it, as behind a proxy.

    Of the forms of an address only the usual one of IPv4 is let through: proxies read the others
    differently.
    """
    try:
        return is_public(ipaddress.IPv4Address(host))
    except ValueError:
        return _PUBLIC_NAME.fullmatch(host) is not None
