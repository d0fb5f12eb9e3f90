"""Several hosts on one machine: a network namespace each, joined by a wire that this process can harm.

Every host has one interface (a TUN device). What a host sends arrives here as packets, and this process hands
them on: late, twice, or not at all. TCP above them is the kernel's own.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET_MAX = 65_536
_libc = ctypes.CDLL(None, use_errno=True)


class NoNetworkError(Exception):
    """This machine does not let this process make networks; the text says what was refused."""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    namespace: int  # an open file of it
    wire: int  # the other end of its interface: packets of bytes

    def enter(self) -> None:
        """This process, which must have one thread, and its children are on that host from now on."""
        if _libc.setns(self.namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network of {self.name}")


def make_host(name: str, address: str) -> Host:
    """Raises NoNetworkError."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        pid = os.fork()
        if pid == 0:
            _make_namespace(there, address)
        os.waitpid(pid, 0)
        here.setblocking(False)
        said, files, _, _ = socket.recv_fds(here, 1000, 2)
    if len(files) < 2:
        raise NoNetworkError(said.decode())
    return Host(name, address, *files)


def _make_namespace(parent: socket.socket, address: str) -> None:
    """In a child: a namespace with one interface, whose ends go to the parent. Never returns."""
    files, said = list[int](), b"a network"
    try:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET) is refused")
        wire = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(wire, TUNSETIFF, struct.pack("16sH14x", b"wire", IFF_TUN | IFF_NO_PI))
        for what in (f"addr add {address}/24 dev wire", "link set wire up", "link set lo up"):
            subprocess.run(["ip", *what.split()], check=True, capture_output=True)  # noqa: S607
        files = [os.open("/proc/self/ns/net", os.O_RDONLY), wire]
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(error).encode()
    finally:
        socket.send_fds(parent, [said], files)
        os._exit(0)


class Network:
    """Hosts by name. Packets go where they should until something is changed."""

    def __init__(self, names: tuple[str, ...], seed: int = 0) -> None:
        """Raises NoNetworkError."""
        self.hosts = {name: make_host(name, f"10.77.0.{n + 1}") for n, name in enumerate(names)}
        self.lost = 0.0  # share of packets that disappear
        self.doubled = 0.0  # and that arrive twice
        self.delay_s = 0.0  # at most; packets overtake each other
        self.apart: frozenset[str] = frozenset()  # hosts that nobody reaches, and that reach nobody
        self.counts: Counter[str] = Counter()
        self._rng = random.Random(seed)
        self._due: list[tuple[float, int, int, bytes]] = []  # when, a number, where to, what
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        by_wire = {host.wire: host for host in self.hosts.values()}
        by_address = {socket.inet_aton(host.address): host for host in self.hosts.values()}
        while True:
            wait_s = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            ready, _, _ = select.select([self._wake[0], *by_wire], [], [], wait_s)
            if self._wake[0] in ready:
                return
            for wire in ready:
                packet = os.read(wire, PACKET_MAX)
                target = by_address.get(packet[16:20]) if packet[0] >> 4 == 4 else None
                if target is not None:
                    self._take(by_wire[wire], target, packet)
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, target_wire, packet = heapq.heappop(self._due)
                os.write(target_wire, packet)

    def _take(self, source: Host, target: Host, packet: bytes) -> None:
        self.counts["packets"] += 1
        if self.apart & {source.name, target.name}:
            self.counts["packets between parted hosts"] += 1
            return
        if self._rng.random() < self.lost:
            self.counts["packets lost"] += 1
            return
        twice = self._rng.random() < self.doubled
        self.counts["packets doubled"] += twice
        for _ in range(1 + twice):
            due = time.monotonic() + self._rng.random() * self.delay_s
            heapq.heappush(self._due, (due, self.counts["packets"], target.wire, packet))

    def close(self) -> None:
        """The namespaces end with the last process in them."""
        os.write(self._wake[1], b"x")
        self._thread.join()
        for host in self.hosts.values():
            os.close(host.namespace)
            os.close(host.wire)
        for end in self._wake:
            os.close(end)


def on(host: Host, work: Callable[[], None]) -> int:
    """Fork a process on that host that does `work`, and exits with 0; or with 1, if it raised. Its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            host.enter()
            work()
            code = 0
        finally:
            os._exit(code)
    return pid
