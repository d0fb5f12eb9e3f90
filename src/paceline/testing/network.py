"""Several hosts on one machine: a network namespace each, joined by a wire that this process can harm.

Every host has one interface (a TUN device). What a host sends arrives here as packets, and this process hands
them on: late, twice, or not at all. TCP above them is the kernel's own. A host may also have a name, memory
(/dev/shm) and mounts of its own.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS = 0x40000000, 0x00020000, 0x04000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
PACKET_MAX = 65_536
_libc = ctypes.CDLL(None, use_errno=True)


class NoNetworkError(Exception):
    """This machine does not let this process make networks; the text says what was refused."""


@dataclass(frozen=True)
class Host:
    name: str
    address: str
    wire: int  # the other end of its interface: packets of bytes
    namespaces: tuple[int, ...]  # an open file of each

    def enter(self) -> None:
        """This process, which must have one thread, and its children are on that host from now on.

        If the host has mounts of its own, the working directory is the root afterwards.
        """
        for namespace in self.namespaces:
            if _libc.setns(namespace, 0):
                raise OSError(ctypes.get_errno(), f"cannot enter {self.name}")


def make_host(name: str, address: str, mounts: Mapping[str, Path] | None = None) -> Host:
    """`mounts`: the host has a name and memory of its own, and these files and folders at these paths.

    Raises NoNetworkError.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        pid = os.fork()
        if pid == 0:
            _make_namespace(there, name, address, mounts)
        os.waitpid(pid, 0)
        here.setblocking(False)
        said, files, _, _ = socket.recv_fds(here, 1000, 4)
    if len(files) < 2:
        raise NoNetworkError(said.decode())
    wire, *namespaces = files
    return Host(name, address, wire, tuple(namespaces))


def _make_namespace(
    parent: socket.socket, name: str, address: str, mounts: Mapping[str, Path] | None
) -> None:
    """In a child: a namespace with one interface, whose ends go to the parent. Never returns."""
    files, said = list[int](), b"a network"
    kinds = {"net": CLONE_NEWNET} | ({} if mounts is None else {"uts": CLONE_NEWUTS, "mnt": CLONE_NEWNS})
    try:
        if _libc.unshare(sum(kinds.values())):
            raise OSError(ctypes.get_errno(), f"unshare of {', '.join(kinds)} is refused")
        if mounts is not None:
            _make_place(name, mounts)
        wire = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(wire, TUNSETIFF, struct.pack("16sH14x", b"wire", IFF_TUN | IFF_NO_PI))
        for what in (f"addr add {address}/24 dev wire", "link set wire up", "link set lo up"):
            subprocess.run(["ip", *what.split()], check=True, capture_output=True)  # noqa: S607
        files = [wire, *(os.open(f"/proc/self/ns/{kind}", os.O_RDONLY) for kind in kinds)]
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(error).encode()
    finally:
        socket.send_fds(parent, [said], files)
        os._exit(0)


def _make_place(name: str, mounts: Mapping[str, Path]) -> None:
    """In new namespaces: a name, memory, and mounts. What is not on the machine is made in a new /mnt."""
    socket.sethostname(name)
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    for path in ("/dev/shm", "/mnt"):  # noqa: S108 (as every host has them)
        _mount("tmpfs", path, "tmpfs", 0)
    for path, source in mounts.items():
        if source.is_dir():
            Path(path).mkdir(parents=True, exist_ok=True)
        _mount(str(source), path, "", MS_BIND)


def _mount(source: str, path: str, kind: str, flags: int) -> None:
    if _libc.mount(source.encode(), path.encode(), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), f"mount of {path} is refused")


def address_of(number: int) -> str:
    """Of the host of this number, from 0."""
    return f"10.77.0.{number + 1}"


class Network:
    """Hosts by name. Packets go where they should until something is changed."""

    def __init__(
        self,
        names: tuple[str, ...],
        seed: int = 0,
        mounts: Mapping[str, Mapping[str, Path]] | None = None,
    ) -> None:
        """`mounts`: by host, see `make_host`. Raises NoNetworkError."""
        given = mounts or {}
        self.hosts = {name: make_host(name, address_of(n), given.get(name)) for n, name in enumerate(names)}
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
            for fd in (host.wire, *host.namespaces):
                os.close(fd)
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
