"""What is public, held against the registries as Python's own tables have them, and against forms that hide IPv4."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.addresses import is_public, may_connect, parse

PUBLIC = ["1.1.1.1", "93.184.216.34", "172.15.0.1", "172.32.0.1", "100.128.0.1", "2606:4700:4700::1111", "2a00:1450::1"]
INSIDE = [
    "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.168.0.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "2001:db8::1",
    "2001::1", "2001:10::1", "3fff::1", "5f00::1", "64:ff9b:1::1",
]  # fmt: skip


def hidden(inside: str) -> list[str]:
    """An IPv4 address in each form that IPv6 has for one."""
    number = int(IPv4Address(inside))
    high, low = f"{number >> 16:x}", f"{number & 0xFFFF:x}"
    return [f"::ffff:{inside}", f"64:ff9b::{high}:{low}", f"2002:{high}:{low}::1", f"::{high}:{low}"]


@pytest.mark.parametrize("text", PUBLIC)
def test_what_anyone_can_reach_is_public(text):
    assert is_public(parse(text))


@pytest.mark.parametrize("text", INSIDE)
def test_what_has_a_purpose_of_its_own_is_not(text):
    assert not may_connect(parse(text))


@pytest.mark.parametrize(
    "text", [form for inside in INSIDE if "." in inside and ":" not in inside for form in hidden(inside)]
)
def test_no_form_hides_an_inner_address(text):
    assert not may_connect(parse(text))


def test_an_ipv6_only_network_s_form_of_a_public_address_is_public():
    assert is_public(parse("64:ff9b::5db8:d822"))
    assert is_public(parse("::ffff:93.184.216.34"))


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_nothing_is_public_that_python_s_tables_call_special(address):
    assert not is_public(address) or address.is_global


@given(st.ip_addresses(v=4), st.integers(0, 32))
def test_a_network_that_the_operator_names_is_allowed_and_its_hidden_forms_are_what_they_hide(address, length):
    network = ip_network((int(address), length), strict=False)
    assert may_connect(address, [network])
    assert may_connect(parse(f"::ffff:{address}"), [network])
    assert may_connect(parse(f"2002:{int(address) >> 16:x}:{int(address) & 0xFFFF:x}::"), [network]) is False


def test_an_address_that_names_its_link_is_refused_even_in_an_allowed_network():
    assert not may_connect(parse("fe80::1%lo"), [ip_network("fe80::/10")])
    assert may_connect(IPv6Address("fe80::1"), [ip_network("fe80::/10")])
