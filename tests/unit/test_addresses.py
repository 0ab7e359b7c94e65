"""Only strangers' web servers on the public internet may be dialled for a client."""

import ipaddress

import pytest

from preprocessing.addresses import is_public, is_public_host

PUBLIC = [
    "1.1.1.1",
    "8.8.8.8",
    "93.184.216.34",
    "223.255.255.254",
    "2606:4700:4700::1111",
    "2a00:1450:4001:829::200e",
    "::ffff:8.8.8.8",
    "64:ff9b::8.8.8.8",
    "2002:808:808::1",  # 6to4 of 8.8.8.8
    "2606:4700::5efe:8.8.8.8",  # ISATAP of it
]
REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",  # carrier-grade NAT
    "100.100.100.200",  # a cloud's metadata service
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # another's
    "169.254.169.254",  # most clouds' metadata service
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "233.252.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:0.0.0.0",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::ffff:0:127.0.0.1",
    "64:ff9b::10.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::8.8.8.8",  # local-use NAT64
    "64:ff9b:1:ffff::10.0.0.1",
    "64:ff9b::a9fe:a9fe%1",
    "2606:4700::5efe:10.0.0.1",  # ISATAP
    "2606:4700::200:5efe:169.254.169.254",
    "2002:808:808:0:0:5efe:7f00:1%1",
    "100::1",
    "2001::1",
    "2001:0:808:808::1",  # Teredo
    "2001:db8::1",
    "2002:7f00:1::1",  # 6to4 of 127.0.0.1
    "2002:a9fe:a9fe::1",
    "2002:c0a8:101::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",  # a metadata service
    "fe80::1",
    "fe80::1%1",
    "fec0::1",
    "ff02::1",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_may_be_dialled(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", REFUSED)
def test_every_other_address_is_refused(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "host",
    ["pictures.example", "a.b.example", "xn--bcher-kva.example", "8.8.8.8", "0x7f.example",
     "local.example", "my_bucket.example", "1.2.3.4.example"],
)  # fmt: skip
def test_a_proxy_may_be_asked_for_public_hosts(host: str) -> None:
    assert is_public_host(host)


@pytest.mark.parametrize(
    "host",
    ["", "localhost", "pictures", "metadata.google.internal", "x.localhost", "printer.local",
     "nas.home.arpa", "1.0.0.127.in-addr.arpa", "db.corp", "router.lan", "localhost.localdomain",
     "127.0.0.1", "10.0.0.1", "169.254.169.254", "127.1", "127.0.1", "2130706433", "0x7f000001",
     "0x7f.1", "0177.0.0.1", "0127.0.0.1", "08.8.8.8", "8.8.8.8.8", "8.8.8.0x8", "1.example.0x1",
     "::1", "2606:4700:4700::1111", "::ffff:8.8.8.8", ".example", "a..example", "127.0.0.1\n"],
)  # fmt: skip
def test_a_proxy_is_asked_for_no_other_host(host: str) -> None:
    assert not is_public_host(host)
