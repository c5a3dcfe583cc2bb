"""Machines reached by ssh: boards, servers, desktops."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hwnas.devices.base import DeviceGoneError
from hwnas.devices.transports import linux
from hwnas.devices.transports.base import Transport
from hwnas.errors import InputError

# What holds whatever the user's config says. A dead network is noticed after 5 x (2 + 1) s.
_OPTIONS = {
    "BatchMode": "yes",
    "PasswordAuthentication": "no",
    "KbdInteractiveAuthentication": "no",
    "StrictHostKeyChecking": "yes",
    "NoHostAuthenticationForLocalhost": "no",
    "VerifyHostKeyDNS": "no",
    "UpdateHostKeys": "no",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",
    "ServerAliveCountMax": "2",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "LogLevel": "INFO",
    "ControlPersist": "no",
}

# The shell that runs it stays: where a signal ends the program, it says so by its status, which sshd does not.
_ANNOUNCE = 'export LC_ALL=C; echo "hwnas $$"; "$@"; exit'

# The socket's folder goes with the connection, also where this process is killed.
_TIDY = 'trap : TERM; "$@"; status=$?; rm -rf "$0"; exit $status'


class Ssh(Transport):
    """Runs programs through OpenSSH's client: keys, addresses, users and jump hosts are those of the user's config.

    All programs share the holder's connection, which is made once; without it they fail, they do not connect anew.
    Nothing is asked on the way: the host's key must be known, and the user's accepted without a password.

    Commands pass through the user's login shell there as words in single quotes, and `sh` runs them: sh, bash, dash,
    zsh and ksh read all of them alike. fish takes backslashes, and csh newlines and `!`, in another way; only commands
    of the device's file can hold these.

    Args:
        host: a host of the user's config, or [user@]address.
        port: where the config does not say.
        config: in place of ~/.ssh/config and the system's.
        common: see `Transport`.

    Raises:
        InputError: the host's name has characters that no name has, and that shells in the user's config would run.
    """

    announces = True

    def __init__(self, host: str, *, port: int | None = None, config: Path | None = None, **common: Any) -> None:
        if not host or host.startswith("-") or re.search(r"[\s'\"`$\\;&<>|(){}\x00-\x1f]", host):  # as OpenSSH 9.6
            raise InputError(f"host {host!r}: is no name of a host")
        super().__init__(**common)
        self.address = f"ssh {host}" if port is None else f"ssh {host} port {port}"
        self._host = host
        self._where = [] if port is None else ["-p", str(port)]
        if config is not None:
            self._where += ["-F", str(config.expanduser().absolute())]
        self._socket = ""

    def argv(self, command: Sequence[str]) -> list[str]:
        """See `Transport`."""
        # The proxy is used only where there is no connection to share, and none is to be made.
        return [*self._client("-o", "ControlMaster=no", "-o", "ProxyCommand=false"), _remote(command)]

    def holder_argv(self, command: Sequence[str]) -> list[str]:
        """See `Transport`."""
        if shutil.which("ssh") is None:
            raise DeviceGoneError(f"{self.address}: there is no ssh here: install OpenSSH's client (openssh-client)")
        parent = tempfile.gettempdir()
        if not re.fullmatch(r"[\w/.-]{1,60}", parent, flags=re.ASCII):  # ssh adds 17 characters; sockets take 104
            parent = "/tmp"
        folder = tempfile.mkdtemp(prefix="hwnas-", dir=parent)
        self._socket = f"{folder}/s"
        return ["sh", "-c", _TIDY, folder, *self._client("-o", "ControlMaster=yes"), _remote(command)]

    def failure(self, status: int, stderr: str) -> str | None:
        """See `Transport`."""
        if status < 0:
            return f"the ssh client here was ended by signal {-status}"
        if status != 255:
            return None
        refused = re.search(r"^mux_client_request_session: .*refused.*", stderr, re.MULTILINE)
        if refused:
            raise DeviceGoneError(f"{self.address}: {refused[0].strip()}: set `MaxSessions 10` in its sshd_config")
        if self._alive():
            return None
        return self._explain(f"{stderr}\n{self._said()}")

    def about(self) -> dict[str, str]:
        """See `Transport`."""
        return linux.about(self)

    def state(self) -> dict[str, Any]:
        """See `Transport`."""
        return linux.state(self)

    def _client(self, *options: str) -> list[str]:
        """The client, up to and with the host."""
        forced = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
        return ["ssh", "-T", *self._where, *forced, "-S", self._socket, *options, "--", self._host]

    def _alive(self) -> bool:
        """Whether the shared connection is still there."""
        holder = self._holder
        if holder is None or holder.poll() is not None:
            return False
        try:
            done = subprocess.run(
                self._client("-O", "check"), stdin=subprocess.DEVNULL, capture_output=True, timeout=5, check=False
            )
            if done.returncode:
                holder.wait(2)  # it says why
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def _explain(self, said: str) -> str:
        """What the client said, as one line with what to do about it."""
        by_hand = shlex.join(["ssh", *self._where, self._host])
        if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
            name = _find(r"Host key for (\S+) has changed", said) or self._host
            kind = (_find(r"Offending (\w+) key in", said) or "*").lower()
            file = _find(r"Offending \w+ key in (.+):\d+\s*$", said)
            old = shlex.join(["ssh-keygen", *(["-f", file] if file else []), "-R", name])
            found = _find(r"(SHA256:[\w+/]+)", said) or "another one"
            return (
                f"THE HOST KEY OF {name} HAS CHANGED to {found}: "
                "the machine was set up anew, or somebody sits in between. Do not go on before this is the key that "
                f"`ssh-keygen -lf /etc/ssh/ssh_host_{kind}_key.pub` prints on the machine itself; then forget the old "
                f"one with `{old}`, and connect once with `{by_hand}`"
            )
        if "Host key verification failed" in said:
            return f"the host key of {self._host} is not known: connect once with `{by_hand}`, and check it"
        if denied := re.search(r"^.*Permission denied \(.*\)", said, re.MULTILINE):
            return (
                f"{denied[0].strip()}: it takes none of your keys without a password: see that `{by_hand}` asks for "
                f"nothing, or add a key with `{shlex.join(['ssh-copy-id', *self._where, self._host])}`"
            )
        remedies = {
            r"Could not resolve hostname.*": f"is the name right? It is looked up as by `{by_hand}`",
            r"Connection refused": "it is up, but no sshd listens there: start it, or is the port another one?",
            r"[Tt]imed out|Timeout, server .*|No route to host|Network is unreachable": "is it on, and on the network?",
            r"Connection (closed|reset).*|closed by remote host|Broken pipe": "it was restarted, or ends connections",
        }
        for pattern, remedy in remedies.items():
            if line := re.search(rf"^.*(?:{pattern})", said, re.MULTILINE):
                return f"{line[0].strip().removeprefix('ssh: ')}: {remedy}"
        lines = said.strip().splitlines()
        return lines[-1].strip()[:300] if lines else "the ssh client said nothing"


def _remote(command: Sequence[str]) -> str:
    """The command line for the login shell there."""
    return "exec " + shlex.join(["sh", "-c", _ANNOUNCE, "sh", *command])


def _find(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found and found[1]
