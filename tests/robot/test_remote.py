"""robot/remote.py: a policy over a socket computes what it computes here; nothing that arrives does harm."""
import json
import socket
import struct
import threading
import time

import numpy as np
import pytest
from helpers import LOWDIM, Recorder, observed, recorder, scaled

from robot.errors import UserError
from robot.policy import Policy
from robot.realtime import RealTime, compute
from robot.remote import MOST_ARRAYS, MOST_HEADER, Remote, Server, receive, send, serve


class Plans(Policy):
    """Keeps the plans that it was given."""

    def sample_chunk(self, plan=None):
        self.plan = plan
        return super().sample_chunk()


@pytest.fixture
def served():
    """serve(policy) -> the address of a server in this process, closed at the end."""
    servers = []

    def start(policy, port=0):
        servers.append(Server(policy, port=port))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return "127.0.0.1:%d" % servers[-1].server_address[1]
    start.stop = lambda: (servers[-1].shutdown(), servers[-1].server_close())
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_message_arrives_as_it_was_sent():
    a, b = socket.socketpair()
    arrays = {"grey": np.arange(6, dtype=np.uint8).reshape(2, 3)[:, ::-1], "none": np.zeros((0, 4)),
              "number": np.float32(2.5), "yes": np.array([True, False]),
              "big": np.arange(3, dtype=">f8")}
    send(a, {"text": "gr\u00fcn", "n": [1, None]}, arrays)
    header, got = receive(b)
    assert header == {"text": "gr\u00fcn", "n": [1, None]} and list(got) == list(arrays)
    for name, x in arrays.items():
        assert np.array_equal(got[name], x) and got[name].shape == x.shape
        assert got[name].dtype.name == x.dtype.name
    with pytest.raises(UserError, match="'o' is object, only uint8"):
        send(a, {}, {"o": np.array([None])})
    with pytest.raises(UserError, match="more than 256 MB"):
        send(a, {}, {"o": np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (MOST_ARRAYS + 1,), (0,))})


def test_a_remote_chunk_is_the_chunk(served):
    description = LOWDIM | {"camera_keys": ["front"], "image_size": [4, 6], "instructions": ["go"]}
    make = lambda: Plans(Recorder(text_len=8), scaled(), description)
    there, here = make(), make()
    worker = Remote(served(there))
    assert worker.settings == {"n_obs_steps": 3, "first_action": -2, "n_action_steps": 4, "fps": 10.0,
                               "keys": ["a", "b", "front", "instruction"]}
    rng = np.random.default_rng(0)
    seen = [observed(t) | {"front": rng.integers(0, 256, (4, 6, 3), np.uint8), "instruction": "go",
                           "unread": np.zeros(9)} for t in range(3)]
    plan = np.ones((8, 2), np.float32), np.ones(8, np.float32)
    expected = compute(here, seen, plan)
    chunk = worker.submit(seen, plan).result(5)
    assert np.array_equal(chunk, expected) and chunk.shape == (8, 2)
    assert np.array_equal(there.plan[0], plan[0][None]) and np.array_equal(there.plan[1], plan[1])
    for key, x in here.model.batches[0].items():
        assert np.array_equal(there.model.batches[0][key], x), key
    assert worker.submit(seen[:1], None).result(5).shape == (8, 2) and there.plan is None
    worker.close()


def test_a_mistake_in_a_question_is_the_users_line_and_the_connection_stays(served):
    worker = Remote(served(recorder()))
    with pytest.raises(UserError, match="the observation lacks 'b'"):
        worker.submit([{"a": np.zeros(1)}], None).result(5)
    with pytest.raises(UserError, match="'a' is not finite"):
        worker.submit([{"a": np.array([np.nan]), "b": np.zeros(2)}], None).result(5)
    with pytest.raises(UserError, match="cannot be answered"):
        worker.submit([observed(0)], (np.ones((3, 9, 9), np.float32), np.ones(2))).result(5)
    assert worker.submit([observed(0)], None).result(5).shape == (8, 2)
    worker.close()


def framed(header, body=b""):
    head = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack(">I", len(head)) + head + body


@pytest.mark.parametrize("garbage", [
    b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", MOST_HEADER + 1), framed(b"\x80\x04pickle"),
    framed(b"[" * 9999),
    framed([]), framed({}), framed({"arrays": 3}), framed({"arrays": [["a", "object", [1]]]}),
    framed({"arrays": [["a", "float64", [2 ** 40]]]}), framed({"arrays": [["a", "float64", [-1]]]}),
    framed({"arrays": [["a", "float64", [2 ** 200, 0, 1.5, "x"]]]}),
    framed({"arrays": [], "observations": 10 ** 9}),
    framed({"arrays": [["7 a", "uint8", [1]]], "observations": 1, "texts": [{}]}, b"x"),
    framed({"arrays": [], "observations": 1, "texts": 5}),
    framed({"arrays": [["a", "uint8", [50]]]}, b"short")],
    ids=range(15))
def test_what_is_no_question_is_refused_and_others_are_answered(served, garbage):
    address = served(recorder())
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), 5) as stranger:
        receive(stranger)
        try:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            header, _ = receive(stranger)
            assert "error" in header
        except OSError:
            pass                                    # closed, which is an answer, too
    worker = Remote(address)
    assert worker.submit([observed(0)], None).result(5).shape == (8, 2)
    worker.close()


class Late(Recorder):
    wait = 0.6

    def sample(self, batch, steps=None, generator=None):
        time.sleep(self.wait)
        return super().sample(batch)


def test_a_late_answer_is_given_up_and_never_taken_for_another(served):
    model = Late()
    worker = Remote(served(Policy(model, scaled(), LOWDIM)), timeout=0.2)
    with pytest.raises(ConnectionError, match=r"the policy at 127.0.0.1:\d+ is lost \(no answer in 0.2 s\)"):
        worker.submit([observed(0)], None).result(5)
    time.sleep(0.6)
    model.wait = 0
    chunk = worker.submit([observed(1)], None).result(5)
    assert chunk[0].tolist() == [2 * (100 - 1)] * 2     # the second chunk of the policy, not the first
    worker.close()


def test_the_server_goes_away_and_comes_back(served):
    """The arm does what is left, holds still, and goes on when the policy is there again."""
    address = served(recorder(n_obs_steps=1, first_action=0))
    port, said = int(address.split(":")[1]), []
    driver = RealTime(Remote(address, 1.0), "naive", lambda o, last: np.full(2, -9.0), say=said.append)
    step = [0]

    def until(condition):
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, said
            action = driver.act(observed(step[0]))
            step[0] += 1
            time.sleep(0.01)
        return action
    until(lambda: len(driver.delays) >= 2)
    served.stop()
    held = driver.held
    assert until(lambda: driver.held > held + 5).tolist() == [-9, -9]
    assert len(said) == 1 and f"the policy at {address} is lost (" in said[0]
    chunks = len(driver.delays)
    served(recorder(n_obs_steps=1, first_action=0), port)
    until(lambda: len(driver.delays) > chunks)
    assert said[1].endswith("a chunk is there, the arm goes on") and len(said) == 2
    assert driver.act(observed(0)).tolist() != [-9, -9]
    driver.close()


def test_another_policy_after_a_restart_ends_the_program(served):
    address = served(recorder(n_obs_steps=1))
    worker = Remote(address, 1.0)
    served.stop()
    worker.disconnect()
    served(recorder(n_obs_steps=2), int(address.split(":")[1]))
    with pytest.raises(UserError, match="another policy is served there now"):
        worker.submit([observed(0)], None).result(5)
    worker.close()


@pytest.mark.parametrize("address", ["", "5555", "host:", "host:x", "host:99999", ":1"])
def test_an_address_that_is_none(address):
    with pytest.raises(UserError, match="is no address: write HOST:PORT"):
        Remote(address)


def test_a_port_that_is_taken_is_named(served):
    port = int(served(recorder()).split(":")[1])
    with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be served on: .*take another --port"):
        serve(recorder(), port=port)


def test_who_speaks_another_protocol_is_not_taken_for_a_policy():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        talk = lambda: listening.accept()[0].sendall(b"SSH-2.0-OpenSSH\r\n")
        threading.Thread(target=talk, daemon=True).start()
        with pytest.raises(ConnectionError, match="does not speak this protocol"):
            Remote("127.0.0.1:%d" % listening.getsockname()[1], 1.0)
