"""Hosts on one machine: network namespaces that a bridge joins, each behind a link of limited rate.

A host is a namespace with one veth link to a bridge, which is in a namespace of its own, so that the machine's own
network is not touched. The rate is limited by a token bucket (``tc tbf``) at both ends of the link: what a host sends,
and what it receives. Needs Linux, root and iproute2.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from moesaic.errors import MoesaicError

INTERFACE = "eth0"
_PREFIX = "moesaic-lab"
# Rate in Gbit/s -> bytes that the bucket lets pass at once after a pause, and the largest packet (put together by the
# sender, GSO) that may pass it. So few that even small messages take their time, but as many as the kernel, which looks
# again only now and then, needs to keep the rate; and packets small enough that those of several senders take turns.
_BUCKETS = {1.0: (64 << 10, 16 << 10), 10.0: (256 << 10, 64 << 10)}
# What may wait in a queue: more than the windows of all senders together, so that nothing is ever lost. A packet lost
# costs TCP 200 ms, which is what would be measured then.
_QUEUE_BYTES = 32 << 20
_WINDOW_BYTES = 4 << 20
_SYSCTLS = (
    # As nothing is lost, all that matters is that it is always there and guesses no rate, as BBR does.
    "net.ipv4.tcp_congestion_control=reno",
    # Gloo's connections are idle between two steps: they shall not start slowly again each time.
    "net.ipv4.tcp_slow_start_after_idle=0",
    f"net.ipv4.tcp_wmem=4096 262144 {_WINDOW_BYTES}",
    f"net.ipv4.tcp_rmem=4096 262144 {_WINDOW_BYTES}",
)


@dataclass(frozen=True)
class Setting:
    """Ranks and what is between them.

    Attributes:
        hosts: 1: processes on this machine, which talk over its loopback; else namespaces.
        per_host: ranks on each.
        gbit: of each host's link in Gbit/s, both ways; None: as fast as the machine is.
    """

    hosts: int
    per_host: int
    gbit: float | None = None

    @property
    def ranks(self) -> int:
        return self.hosts * self.per_host

    @property
    def uses_namespaces(self) -> bool:
        return self.hosts > 1

    def __str__(self) -> str:
        if self.hosts == 1:
            return f"{self.ranks} ranks on one machine"
        each = "" if self.per_host == 1 else f" of {self.per_host} ranks"
        rate = "links not limited" if self.gbit is None else f"{self.gbit:g} Gbit/s"
        return f"{self.hosts} hosts{each}, {rate}"


def missing() -> str | None:
    """Why there can be no namespaces here, or None."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"{tool} is not there (Debian's package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{_PREFIX}-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {_last_line(made.stderr)}"
    _run(["ip", "netns", "delete", name])
    return None


class Lab:
    """The namespaces of a setting while it is entered.

    Raises:
        MoesaicError: on entering, where a command fails.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.name = f"{_PREFIX}-{os.getpid()}"

    def __enter__(self) -> Lab:
        sweep()
        if self.setting.uses_namespaces:
            try:
                for command in set_up(self.setting, self.name):
                    _run(command)
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Delete the namespaces, and with them what is in them."""
        delete(f"{self.name}-{part}" for part in parts(self.setting))

    def command(self, host: int, command: Sequence[str]) -> list[str]:
        """``command`` as it runs on a host."""
        if not self.setting.uses_namespaces:
            return list(command)
        return ["ip", "netns", "exec", f"{self.name}-h{host}", *command]

    @property
    def address(self) -> str:
        """Host 0's."""
        return address(0) if self.setting.uses_namespaces else "127.0.0.1"

    @property
    def interface(self) -> str:
        """By which ranks talk to each other."""
        return INTERFACE if self.setting.uses_namespaces else "lo"


def address(host: int) -> str:
    """Of a host, inside the lab."""
    return f"10.99.0.{host + 1}"


def parts(setting: Setting) -> list[str]:
    """What the names of the namespaces end with."""
    return ["switch", *(f"h{host}" for host in range(setting.hosts))] if setting.uses_namespaces else []


def set_up(setting: Setting, name: str) -> Iterator[list[str]]:
    """The commands that make the namespaces ``name-switch``, ``name-h0``, ..."""
    switch = f"{name}-switch"
    for part in parts(setting):
        yield ["ip", "netns", "add", f"{name}-{part}"]
    yield ["ip", "-n", switch, "link", "add", "bridge", "type", "bridge"]
    yield ["ip", "-n", switch, "link", "set", "bridge", "up"]
    for host in range(setting.hosts):
        inside, port = f"{name}-h{host}", f"port{host}"
        veth = ["ip", "link", "add", INTERFACE, "netns", inside, "type", "veth"]
        yield [*veth, "peer", "name", port, "netns", switch]
        yield ["ip", "-n", inside, "address", "add", f"{address(host)}/24", "dev", INTERFACE]
        yield ["ip", "netns", "exec", inside, "sysctl", "-q", "-w", *_SYSCTLS]
        for device in ("lo", INTERFACE):
            yield ["ip", "-n", inside, "link", "set", device, "up"]
        yield ["ip", "-n", switch, "link", "set", port, "master", "bridge", "up"]
        if setting.gbit is not None:
            yield from limit(inside, INTERFACE, setting.gbit)
            yield from limit(switch, port, setting.gbit)


def limit(namespace: str, device: str, gbit: float) -> Iterator[list[str]]:
    """The commands that limit what a device sends."""
    burst, packet = _BUCKETS.get(gbit, max(_BUCKETS.values()))
    yield ["ip", "-n", namespace, "link", "set", device, "gso_max_size", str(packet)]
    bucket = ["rate", f"{gbit * 1000:g}mbit", "burst", f"{burst}b", "limit", f"{_QUEUE_BYTES}b"]
    yield ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *bucket]


def sweep() -> None:
    """Delete what runs left behind that were killed."""
    told = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout if shutil.which("ip") else ""
    delete(left_behind(told, _is_alive))


def left_behind(told: str, is_alive: Callable[[int], bool]) -> list[str]:
    """Names of ``ip netns list`` whose process is no longer there.

    Args:
        is_alive: tells of a process id.
    """
    found = re.findall(rf"^({_PREFIX}-(\d+)-\w+)", told, re.MULTILINE)
    return [name for name, process in found if not is_alive(int(process))]


def delete(names: Iterable[str]) -> None:
    """Delete namespaces; those that are not there are passed over."""
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MoesaicError(f"{' '.join(command)}: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "failed without a word"
