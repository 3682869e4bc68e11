"""Sockets of mirrored processes: what is said on the host's loopback is said on the guest's."""

from __future__ import annotations

import socket

import pytest

from tests.mount.conftest import Run
from tests.mount.mirrored import SETUP, SHOW, hits
from tests.mounted import FAKEFS

_TALK = """
import os, socket, sys
family, address = eval(sys.argv[1])
listening = socket.socket(family)
listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listening.bind(address)
listening.listen()
child = os.fork()
if child == 0:
    listening.close()
    client = socket.socket(family)
    client.connect(address)
    client.sendall(b"question")
    answer = client.recv(100)
    assert answer == b"answer!" and client.recv(100) == b"", answer
    os._exit(0)
served, _ = listening.accept()
question = served.recv(100)
served.send(b"answer!")
served.close()
_, status = os.waitpid(child, 0)
print(question.decode(), status)
"""


def _free_port(kind: int) -> int:
    """A port that nobody has at the moment: which one the kernel chooses for a program, the guest does not know."""
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.parametrize(
    ("family", "address", "function"),
    [("AF_INET", '("127.0.0.1", PORT)', "tcp_sendmsg"), ("AF_UNIX", '"socket"', "unix_stream_sendmsg")],
)
def test_a_server_and_a_client(mirrored: Run, family: str, address: str, function: str) -> None:
    address = address.replace("PORT", str(_free_port(socket.SOCK_STREAM)))
    done = mirrored(
        SETUP
        + f"""
        echo 'p:sent {function} size=$arg3' > kprobe_events
        on kprobes syscalls/sys_exit_accept4 syscalls/sys_exit_recvfrom
        cd "$OLDPWD"
        {FAKEFS[0]} -c '{_TALK}' '(socket.{family}, {address})'
        """
        + SHOW,
        "all",
    )
    assert done.stdout.splitlines()[0] == "question 0"
    seen = hits(done)
    assert [hit.fields["size"] for hit in seen if hit.event == "sent"] == [8, 7]
    results = [(hit.event, int(hit.text.split()[-1], 16)) for hit in seen if hit.event != "sent"]
    received = sorted(result for event, result in results if event == "sys_exit_recvfrom" and result < 1 << 63)
    assert received == [0, 7, 8]
    assert [result for event, result in results if event == "sys_exit_accept4" and result < 1 << 63] != []


def test_what_the_guest_has_no_network_for(mirrored: Run) -> None:
    """Datagrams on the loopback arrive; what goes elsewhere is not tried in the guest."""
    program = """
import socket
one, two = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
one.bind(("127.0.0.1", PORT))
two.sendto(b"datagram", ("127.0.0.1", PORT))
print(one.recvfrom(100)[0])
two.settimeout(5)
try:
    two.sendto(b"away", ("192.0.2.1", 9))
except OSError:
    pass
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).getsockname()
a, b = socket.socketpair()
a.send(b"pair")
print(b.recv(100))
"""
    program = program.replace("PORT", str(_free_port(socket.SOCK_DGRAM)))
    done = mirrored(
        SETUP
        + f"""
        echo 'p:sent udp_sendmsg size=$arg3' > kprobe_events
        echo 'p:got udp_recvmsg' >> kprobe_events
        on kprobes
        {FAKEFS[0]} -c '{program}'
        """
        + SHOW,
        "all",
    )
    assert done.stdout.splitlines()[:2] == ["b'datagram'", "b'pair'"]
    assert [(hit.event, hit.fields.get("size")) for hit in hits(done)] == [("sent", 8), ("got", None)]


_TWO_CLIENTS = """
import os, socket
family = socket.AF_INET
listening = socket.socket(family)
listening.bind(("127.0.0.1", 0))
listening.listen()
clients = [socket.create_connection(listening.getsockname()) for _ in range(2)]
one, two = listening.accept()[0], listening.accept()[0]
for client, size in zip(clients, (5, 9)):
    client.send(bytes(size))
for server in two, one:
    server.recv(100)
print(listening.getsockname()[1])
"""


def test_a_port_that_the_kernel_chooses(mirrored: Run) -> None:
    """It is the same in the guest; and who has been accepted first is heard there when he is heard here."""
    done = mirrored(
        SETUP
        + f"""
        on syscalls/sys_enter_recvfrom syscalls/sys_exit_recvfrom sock/inet_sock_set_state
        {FAKEFS[0]} -c '{_TWO_CLIENTS}'
        """
        + SHOW,
        "all",
    )
    port = int(done.stdout.splitlines()[0])
    seen = hits(done)
    listens = [hit.fields for hit in seen if "newstate=TCP_LISTEN" in hit.text]
    assert [str(fields["sport"]) for fields in listens] == [str(port)]
    received = [int(hit.text.split()[-1], 16) for hit in seen if hit.event == "sys_exit_recvfrom"]
    assert received == [9, 5]
