"""A private sshd on the loopback, for tests: `with Sshd(folder) as server: ... server.config ...`.

It runs without any privilege and lets in only the key made for it. An sshd without privileges can only log in its own
user, who needs a shell: where the system allows it, the server lives in a user namespace of its own, in which our user
is `nobody`, whose home and shell are ours to choose, and which has a disk of one megabyte. Else it is our own user, but
never root.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")

# As root of a new user namespace, then as nobody of another one inside it: without its capabilities.
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")
_INSIDE = """set -e
mount --bind "$1/passwd" /etc/passwd
mount -t tmpfs -o size=1m,mode=0777 tmpfs "$1/small"
folder=$1; shift
exec unshare --user --map-user=65534 --map-group=65534 "$@"
"""


def _namespaces(folder: Path) -> bool:
    done = subprocess.run([*_NAMESPACE, "sh", "-c", _INSIDE, "sh", folder, "true"], capture_output=True, check=False)
    return done.returncode == 0


class Sshd:
    """A server and what is needed to log in there.

    Attributes:
        config: an ssh config file with the host `board`. It asks for all that measuring must not do.
        home: the user's home there.
        known_hosts: the file of known hosts.
        small: a folder there on a disk of one megabyte; None where that cannot be had.
    """

    def __init__(self, folder: Path) -> None:
        if _SSHD is None:
            pytest.skip("no sshd: install openssh-server")
        self._folder = folder
        self.home, self.known_hosts, self.config = folder / "home", folder / "known_hosts", folder / "config"
        for name in ("home", "small"):
            (folder / name).mkdir()
        (folder / "passwd").write_text(f"root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::{self.home}:/bin/bash\n")
        self._prefix: list[str | Path] = []
        self.small: Path | None = None
        self.user = "nobody"
        if _namespaces(folder):
            self._prefix = [*_NAMESPACE, "sh", "-c", _INSIDE, "sh", folder]
            self.small = folder / "small"
        elif os.getuid() == 0:
            pytest.skip("root cannot make a user namespace here (unshare --user), and sshd is not to run as root")
        else:
            self.user = pwd.getpwuid(os.getuid()).pw_name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.new_host_key()
        self.know()
        _keygen(folder / "user_key")
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        self.configure()
        self.config.write_text(
            f"Host board\nHostName 127.0.0.1\nPort {self.port}\nUser {self.user}\n"
            f"IdentityFile {folder / 'user_key'}\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {self.known_hosts}\nGlobalKnownHostsFile /dev/null\n"
            "StrictHostKeyChecking no\nControlMaster auto\nControlPath ~/.ssh/never-%C\nControlPersist yes\n"
            "RequestTTY force\nRemoteCommand false\nLogLevel QUIET\nNoHostAuthenticationForLocalhost yes\n"
        )

    def configure(self, *lines: str) -> None:
        """Write the server's config, for the next start."""
        options = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": self._folder / "host_key",
            "AuthorizedKeysFile": self._folder / "authorized_keys",
            "PidFile": "none",
            "StrictModes": "no",  # /tmp is everybody's
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
        }
        text = "".join(f"{name} {value}\n" for name, value in options.items())
        (self._folder / "sshd_config").write_text(text + "".join(f"{line}\n" for line in lines))

    def new_host_key(self) -> None:
        """Another host key, from the next start on."""
        for path in self._folder.glob("host_key*"):
            path.unlink()
        _keygen(self._folder / "host_key")

    def know(self) -> None:
        """Write the host key of now into the file of known hosts, alone."""
        kind, key, *_ = (self._folder / "host_key.pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")

    def start(self) -> None:
        """Start the server, and wait until it listens."""
        assert self._process is None
        log = self._folder / "log"
        with log.open("ab") as file:
            argv = [*self._prefix, _SSHD, "-D", "-e", "-f", self._folder / "sshd_config"]
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        for _ in range(200):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.02)
        pytest.fail(f"sshd does not start: {log.read_text()}")

    @property
    def log(self) -> str:
        """What the server said since it was made."""
        return (self._folder / "log").read_text()

    def sessions(self) -> list[int]:
        """The server's processes that serve a connection each."""
        assert self._process is not None
        return [pid for pid in _descendants(self._process.pid) if _argv(pid)[0].startswith("sshd")]

    def cut(self) -> None:
        """End all connections, as a crash of the server would; it takes new ones. What runs there is told no more."""
        for pid in self.sessions():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """End the server and all connections."""
        if self._process is not None:
            self.cut()
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def programs(name: str, word: str) -> list[int]:
    """The PIDs of what runs on this machine, by how it was called and a part of its arguments."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if (argv := _argv(pid))[0] == name and word in " ".join(argv[1:])]


def _keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def _argv(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return [""]


def _descendants(pid: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(file.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(file.parent.name)
                found += [child, *_descendants(child)]
    return found
