# SPDX-License-Identifier: Apache-2.0
"""Hosts of their own on this machine: name spaces of network and host name, joined by a bridge in one more."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

PROGRAMS = ("ip", "tc", "unshare", "ps")
INTERFACE = "eth0"


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Several hosts with the addresses 10.77.0.1 and up, while the block lasts.

    Args:
        names: of the hosts.
    """

    def __init__(self, *names: str) -> None:
        self.names = names
        self.mark = f"mb{os.getpid()}"
        self.processes: dict[str, subprocess.Popen[str]] = {}

    def _space(self, name: str) -> str:
        return f"{self.mark}-{name}"

    def address(self, name: str) -> str:
        return f"10.77.0.{self.names.index(name) + 1}"

    def __enter__(self) -> Hosts:
        switch = self._space("switch")
        try:
            _ip("netns", "add", switch)
            _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", switch, "link", "set", "bridge", "up")
            for name in self.names:
                space = self._space(name)
                _ip("netns", "add", space)
                _ip("-n", space, "link", "add", INTERFACE, "type", "veth", "peer", "name", name, "netns", switch)
                _ip("-n", switch, "link", "set", name, "master", "bridge", "up")
                _ip("-n", space, "addr", "add", f"{self.address(name)}/24", "dev", INTERFACE)
                for interface in ("lo", INTERFACE):
                    _ip("-n", space, "link", "set", interface, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.kill(name)
        for process in self.processes.values():
            process.communicate(timeout=30)
        for line in _ip("netns", "list").splitlines():
            if line.split()[0].startswith(f"{self.mark}-"):
                _ip("netns", "delete", line.split()[0])

    def start(self, name: str, command: list[str], output: Path, folder: Path, **variables: str) -> None:
        """Run a command on a host."""
        line = ["ip", "netns", "exec", self._space(name), "unshare", "--uts"]
        with output.open("w") as file:
            self.processes[name] = subprocess.Popen(
                [*line, "bash", "-c", f'hostname {name}; exec "$@"', name, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=folder,
                env={**os.environ, **variables},
            )

    def slow_down(self, name: str, megabits: int) -> None:
        """Let a host send no more than so many megabits a second."""
        limit = ["rate", f"{megabits}mbit", "burst", "64kb", "latency", "50ms"]
        line = ["ip", "netns", "exec", self._space(name), "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf"]
        subprocess.run([*line, *limit], check=True)

    def cut_off(self, name: str) -> None:
        """Unplug a host: nothing tells the others that it is gone."""
        _ip("-n", self._space("switch"), "link", "set", name, "down")

    def kill(self, name: str) -> None:
        """Kill everything that runs on a host at once: nothing on it lives to see, or report, that another died."""
        stopped: set[int] = set()
        while new := self._running(name) - stopped:  # what was started before its parent was stopped
            self._signal(new, signal.SIGSTOP)
            stopped |= new
        self._signal(stopped, signal.SIGKILL)

    def _running(self, name: str) -> set[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._space(name)], capture_output=True, text=True)
        return {int(process) for process in listed.stdout.split()}

    def _signal(self, processes: set[int], number: signal.Signals) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
