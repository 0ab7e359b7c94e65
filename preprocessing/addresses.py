"""Which network addresses a client's URL may lead to. Pure; used by the fetcher before it dials.

The question is asked of an address, never of a name: names can be made to mean anything.
"""

import ipaddress

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


def is_public(address: Address) -> bool:
    """Whether the address is a unicast address on the public internet.

    IPv6 addresses that carry an IPv4 address (mapped, NAT64, 6to4) are judged by that one;
    Teredo and everything outside the assigned public space is refused.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.teredo is not None or address not in _ASSIGNED_V6:
            return False
    special = any(address in network for network in _REFUSED)
    return address.is_global and not address.is_multicast and not special
