"""Which addresses a stranger may make this process connect to: public ones, and those that the operator has named.

What is asked about is an address, never a name or its spelling: whoever connects does so to the very address that was
asked about.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Written down, as `ipaddress.is_global` answers differently from one Python to the next. IANA's special-purpose
# registries: https://www.iana.org/assignments/iana-ipv4-special-registry and .../iana-ipv6-special-registry.
_SPECIAL_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this host
            "10.0.0.0/8",
            "100.64.0.0/10",  # behind a provider's NAT
            "127.0.0.0/8",
            "168.63.129.16/32",  # in no registry: Azure's services inside every virtual machine
            "169.254.0.0/16",  # link-local, a cloud's metadata among it
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast among it
        ),
    )
)
_GLOBAL_6 = IPv6Network("2000::/3")  # all that is given out; what lies outside has a purpose of its own
_SPECIAL_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocols, Teredo with an IPv4 address inside among them
            "2001:db8::/32",
            "2002::/16",  # 6to4, with an IPv4 address inside
            "3fff::/20",
        ),
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # what an IPv6-only network is told for a host that has IPv4 alone


def parse(text: str) -> Address:
    """The address that a connection would end at: IPv4 written as IPv6 (::ffff:a.b.c.d) is IPv4."""
    address = ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def may_connect(address: Address, networks: Iterable[Network] = ()) -> bool:
    """Whether it is public or in one of `networks`."""
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return False  # means something on one link alone
    return is_public(address) or any(address in network for network in networks)


def is_public(address: Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _SPECIAL_4)
    if address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _GLOBAL_6 and not any(address in network for network in _SPECIAL_6)
