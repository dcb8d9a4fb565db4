"""A policy in another process or on another machine.

    serve(Policy.load("out/pi0"), port=5555)            where the GPU is
    worker = Remote("gpu-machine:5555")                 on the robot, in place of InThread
    policy = RealTime(worker, "rtc", hold)

One connection carries one question at a time and its answer; each is one message:

    length of the header (4 bytes, big-endian) | header, JSON in UTF-8 | the arrays, little-endian

The header names the arrays with their types and shapes. All lengths are bounded and all types are known
before anything is read, and nothing is ever unpickled. This needs the standard library and numpy: a robot's
computer has them, and there is nothing to install at either end. Every message is checked: whoever connects
can ask for chunks and nothing else. The connection is neither encrypted nor protected by a password: serve on
127.0.0.1, the default, and reach it through an SSH tunnel, or stay in a network of your own.

When a connection is lost, or an answer is late, the question is lost with it (OSError): RealTime asks again,
from what the robot sees then. A late answer is never taken for the answer to a later question, since its
connection is closed.
"""
import contextlib
import json
import math
import socket
import socketserver
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .errors import UserError, one_line
from .realtime import compute, settings_of

PROTOCOL = 1
MOST_HEADER, MOST_ARRAYS = 2 ** 20, 2 ** 28         # bytes
MOST_OBSERVATIONS = 64
TYPES = ("uint8", "int32", "int64", "float32", "float64", "bool")


def send(connection, header, arrays):
    """header: values of JSON; arrays: {name: array}."""
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    listed = [[name, x.dtype.name, list(x.shape)] for name, x in arrays.items()]
    for name, kind, _ in listed:
        if kind not in TYPES:
            raise UserError(f"{name!r} is {kind}, only {', '.join(TYPES)} can be sent")
    size = sum(x.nbytes for x in arrays.values())
    head = json.dumps(header | {"arrays": listed}).encode()
    if len(head) > MOST_HEADER or size > MOST_ARRAYS:
        raise UserError(f"a message of more than {MOST_ARRAYS >> 20} MB: send smaller pictures")
    parts = [x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes() for x in arrays.values()]
    connection.sendall(b"".join([struct.pack(">I", len(head)), head, *parts]))


def receive(connection):
    """-> header, {name: array}. Raises ConnectionError if the other side is gone or speaks something else."""
    length, = struct.unpack(">I", exactly(connection, 4))
    if length > MOST_HEADER:
        raise ConnectionError("the other side does not speak this protocol")
    try:
        header = json.loads(exactly(connection, length))
        listed = [(name, np.dtype(TYPES[TYPES.index(kind)]).newbyteorder("<"), shape)
                  for name, kind, shape in header.pop("arrays")]
        for name, _, shape in listed:
            if not isinstance(name, str) or any(type(n) is not int or n < 0 for n in shape):
                raise ValueError(name)
        sizes = [kind.itemsize * math.prod(shape) for _, kind, shape in listed]
        if sum(sizes) > MOST_ARRAYS:
            raise ValueError("too much")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConnectionError("the other side does not speak this protocol") from None
    return header, {name: np.frombuffer(exactly(connection, size), kind).reshape(shape)
                    for (name, kind, shape), size in zip(listed, sizes)}


def exactly(connection, n):
    data = bytearray(n)
    view = memoryview(data)
    while view:
        got = connection.recv_into(view)
        if not got:
            raise ConnectionError("the other side has closed the connection")
        view = view[got:]
    return data


# ---------------------------------------------------------------- where the policy is

def answer(policy, header, arrays):
    """A question, as `Remote.ask` writes it -> (header, arrays) of its answer. Raises UserError."""
    count = header.get("observations")
    if not isinstance(count, int) or not 1 <= count <= MOST_OBSERVATIONS:
        raise UserError("a question without observations")
    observations = [dict(header["texts"][i]) for i in range(count)]
    plan = {}
    for name, x in arrays.items():
        where, _, key = name.partition(" ")
        if where == "plan":
            plan[key] = x
        else:
            observations[int(where)][key] = x
    chunk = compute(policy, observations, (plan["target"], plan["weight"]) if plan else None)
    return {}, {"chunk": chunk}


class Server(socketserver.ThreadingTCPServer):
    """A policy that answers; `serve_forever`, `shutdown` and `server_close` as in the standard library.
    Several robots may be connected; they are answered one after the other."""
    allow_reuse_address = daemon_threads = True

    def __init__(self, policy, host="127.0.0.1", port=0):
        self.policy, self.busy, self.connections = policy, threading.Lock(), set()
        super().__init__((host, port), Conversation)

    def server_close(self):
        """Hang up, too."""
        super().server_close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Conversation(socketserver.BaseRequestHandler):
    def handle(self):
        connection, policy = self.request, self.server.policy
        self.server.connections.add(connection)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            send(connection, {"protocol": PROTOCOL, "settings": settings_of(policy)}, {})
            while True:
                question = receive(connection)
                try:
                    with self.server.busy:
                        header, arrays = answer(policy, *question)
                except UserError as e:
                    header, arrays = {"error": str(e)}, {}
                except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as e:
                    header, arrays = {"error": f"a question that cannot be answered: {one_line(e)}"}, {}
                send(connection, header, arrays)
        except OSError:         # the robot is gone; it will come back
            pass
        finally:
            self.server.connections.discard(connection)


def serve(policy, host="127.0.0.1", port=5555):
    """Answer until the program is stopped."""
    try:
        server = Server(policy, host, port)
    except (OSError, OverflowError) as e:
        raise UserError(f"{host}:{port} cannot be served on: {getattr(e, 'strerror', None) or e}; take "
                        f"another --port") from None
    with server:
        server.serve_forever()


# ---------------------------------------------------------------- where the robot is

class Remote:
    """A worker (realtime.py) whose policy is served at `address`, "HOST:PORT". timeout: seconds after which
    an answer is given up, and the longest that a connection may take. The first one is made here: OSError if
    nobody answers, UserError if the address is none."""

    def __init__(self, address, timeout=2.0):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise UserError(f"{one_line(address, 60)!r} is no address: write HOST:PORT, as in 127.0.0.1:5555")
        self.address, self.timeout = (host, int(port)), timeout
        self.connection, self.pool = None, ThreadPoolExecutor(1)
        self.settings = None
        self.connect()

    def connect(self):
        connection = socket.create_connection(self.address, self.timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            header, _ = receive(connection)
            if header.get("protocol") != PROTOCOL:
                raise ConnectionError("another version of this code is served there")
            if self.settings not in (None, header["settings"]):
                raise UserError("another policy is served there now: start the robot's program again")
        except BaseException:
            connection.close()
            raise
        self.connection, self.settings = connection, header["settings"]

    def submit(self, observations, plan):
        return self.pool.submit(self.ask, observations, plan)

    def ask(self, observations, plan):
        """The chunk. Raises OSError if the question is lost, UserError if it is wrong."""
        header = {"observations": len(observations),
                  "texts": [{k: o[k] for k in ("instruction",) if k in o} for o in observations]}
        arrays = {f"{i} {k}": np.asarray(o[k]) for i, o in enumerate(observations)
                  for k in self.settings["keys"] if k in o and k != "instruction"}
        if plan is not None:
            arrays |= {"plan target": plan[0], "plan weight": plan[1]}
        try:
            if self.connection is None:
                self.connect()
            send(self.connection, header, arrays)
            header, arrays = receive(self.connection)
        except OSError as e:
            self.disconnect()
            why = f"no answer in {self.timeout:g} s" if isinstance(e, TimeoutError) else e.strerror or e
            host, port = self.address
            raise ConnectionError(f"the policy at {host}:{port} is lost ({one_line(why)})") from None
        if "error" in header:
            raise UserError(one_line(header["error"], 300))
        return arrays["chunk"]

    def disconnect(self):
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.close()

    def close(self):
        self.pool.shutdown(cancel_futures=True)
        self.disconnect()
