"""The Python client where things go wrong: killed services, full queues and disks, lost answers."""

import asyncio
import resource
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx2
import hypothesis
import hypothesis.strategies as st
import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from app.settings import Settings
from app.tables import events
from shortlist_client import (
    NO_RETRIES,
    AnswerError,
    AsyncClient,
    Client,
    ConnectionFailedError,
    Event,
    NotFoundError,
    ProblemError,
    Retries,
    UnavailableError,
)

PATIENT = Retries(tries=10_000, within=600, first_delay=0.01, max_delay=0.05)


class Relay:
    """Passes bytes between clients and a service, and can keep the service's answers to itself."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.withhold = False
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.threads.append(threading.Thread(target=self._connect, args=(client,)))
            self.threads[-1].start()

    def _connect(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self.port)) as service:
            back = threading.Thread(target=self._copy, args=(service, client, True))
            back.start()
            self._copy(client, service, False)
            back.join()

    def _copy(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if not (answers and self.withhold):
                    target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def relay() -> Iterator[Callable[[int], Relay]]:
    relays: list[Relay] = []

    def make(port: int) -> Relay:
        relays.append(Relay(port))
        return relays[-1]

    yield make
    for made in relays:
        made.close()


class Sending:
    """Sends events through a client of each kind at the same time, beside the test."""

    def __init__(self, address: str, retries: Retries, *lists: list[Event]) -> None:
        self.outcomes: dict[str, list[str]] = {}
        self.threads = [threading.Thread(target=self._send, args=(address, retries, one)) for one in lists[::2]]
        self.threads += [
            threading.Thread(target=asyncio.run, args=(self._send_async(address, retries, one),)) for one in lists[1::2]
        ]
        for thread in self.threads:
            thread.start()

    def _send(self, address: str, retries: Retries, sent: list[Event]) -> None:
        with Client(address, retries=retries) as client:
            self.outcomes[sent[0].event_id] = [result.outcome for result in client.feedback_many(sent)]

    async def _send_async(self, address: str, retries: Retries, sent: list[Event]) -> None:
        async with AsyncClient(address, retries=retries) as client:
            self.outcomes[sent[0].event_id] = [result.outcome for result in await client.feedback_many(sent)]

    def ended(self) -> dict[str, list[str]]:
        for thread in self.threads:
            thread.join()
        return self.outcomes


def clicks(name: str, number: int = 3) -> list[Event]:
    return [Event(name, f"item-{row}", "click", event_id=f"{name}-{row}") for row in range(number)]


def stored(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return sorted(connection.scalars(sa.select(events.c.event_id)))


def answered(address: str, status: int) -> int:
    """How often the service answered `POST /feedback` with this status."""
    counter = f'shortlist_requests_total{{method="POST",route="/feedback",status="{status}"}} '
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    return sum(int(float(line.removeprefix(counter))) for line in lines if line.startswith(counter))


def until(condition: Callable[[], object]) -> None:
    for _ in range(6_000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come to that")


def test_feedback_counts_once_whatever_happens_to_the_service(
    live_server: Callable[..., Any], relay: Callable[[int], Relay], settings: Settings, engine: Engine
) -> None:
    server = live_server(embedded_worker=False, feedback_queue=2)
    server.start()
    if settings.resolved_database_url.startswith("sqlite"):
        waits_for_room_in_the_queue(server, str(sa.make_url(settings.resolved_database_url).database))
        waits_for_room_on_the_disk(server)
    before = stored(engine)

    between = relay(server.settings.port)
    between.withhold = True
    sending = Sending(between.address, PATIENT, clicks("sync"), clicks("async"))
    expected = sorted(before + [event.event_id for event in clicks("sync") + clicks("async")])
    until(lambda: stored(engine) == expected)  # committed, but nobody hears of it
    server.kill()
    between.withhold = False
    server.start()
    assert sending.ended() == {"sync-0": ["duplicate"] * 3, "async-0": ["duplicate"] * 3}
    assert stored(engine) == expected
    assert server.stop() == 0


def waits_for_room_in_the_queue(server: Any, database: str) -> None:
    """Requests are being committed and cannot be, two wait, and there is room for no more: 429."""
    address = str(server.client.base_url)

    def waiting() -> int:
        return int(httpx2.get(f"{address}/health/ready").json()["feedback_waiting"])

    def fill(number: int) -> int:
        event = {"user_id": "filler", "item_id": f"item-{number}", "type": "click"}
        return httpx2.post(f"{address}/feedback", json=event, timeout=60).status_code

    with ThreadPoolExecutor() as pool, closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        fillers = []
        while waiting() < 2:  # how many are committed together is up to the service
            fillers.append(pool.submit(fill, len(fillers)))
            threading.Event().wait(0.1)
        before = answered(address, 429)
        sending = Sending(address, PATIENT, clicks("sync1"), clicks("async1"))
        until(lambda: answered(address, 429) >= before + 2)
        other.execute("ROLLBACK")
        assert {filler.result() for filler in fillers} <= {201, 429}
    assert sending.ended() == {"sync1-0": ["stored"] * 3, "async1-0": ["stored"] * 3}


def waits_for_room_on_the_disk(server: Any) -> None:
    """The database cannot grow: 503."""
    address = str(server.client.base_url)
    unlimited = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (16_384, unlimited[1]))
    with Client(address, retries=NO_RETRIES) as hasty, pytest.raises(UnavailableError) as refused:
        hasty.feedback(clicks("hasty")[0])
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    assert answered(address, 503) == 1
    sending = Sending(address, PATIENT, clicks("sync2"), clicks("async2"))
    until(lambda: answered(address, 503) >= 3)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, unlimited)
    assert sending.ended() == {"sync2-0": ["stored"] * 3, "async2-0": ["stored"] * 3}


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_is_wrong_is_sent_once(address: str) -> None:
    wrong = Event("anna", "du/ne", "click")
    with Client(address, retries=PATIENT) as client:
        with pytest.raises(ProblemError):
            client.feedback(wrong)
        assert answered(address, 422) == 1
        with pytest.raises(NotFoundError):
            client.run("20260101-000000-000000")

    async def asynchronous() -> None:
        async with AsyncClient(address, retries=PATIENT) as client:
            with pytest.raises(ProblemError):
                await client.feedback(wrong)

    asyncio.run(asynchronous())
    assert answered(address, 422) == 2


class Script:
    """A service that gives the answers it was told to, one after another, then none: it closes the connection."""

    def __init__(self, *answers: bytes) -> None:
        self.requests: list[bytes] = []
        self.answers = list(answers)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._answer)
        self.thread.start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                request = connection.recv(65_536)
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65_536)
                self.requests.append(request)
                if self.answers:
                    connection.sendall(self.answers.pop(0))

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


def answer(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


@pytest.fixture
def script() -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    def make(*answers: bytes) -> Script:
        scripts.append(Script(*answers))
        return scripts[-1]

    yield make
    for made in scripts:
        made.close()


HASTY = Retries(tries=3, first_delay=0)
CHART = b'{"recommendation_id": "r-1", "items": [], "source": "added later", "added_later": 1}'
POPULAR = answer("200 OK", CHART)


def test_a_proxy_that_lost_the_service_is_asked_again_with_the_same_request(script: Callable[..., Script]) -> None:
    server = script(answer("502 Bad Gateway", b"<html>"), answer("504 Gateway Timeout", b""), POPULAR)
    with Client(server.address, retries=HASTY) as client:
        assert client.popular().recommendation_id == "r-1"
    assert len(server.requests) == 3
    assert len(set(server.requests)) == 1


def test_a_retraining_is_asked_for_with_one_key_and_a_rollback_once(script: Callable[..., Script]) -> None:
    server = script()
    with Client(server.address, retries=HASTY) as client:
        with pytest.raises(ConnectionFailedError, match=r"POST /admin/retrain: .* \(3 tries\)") as failed:
            client.retrain("caser")
        assert isinstance(failed.value.__cause__, httpx2.TransportError)
        keys = {line for request in server.requests for line in request.split(b"\r\n") if b"dempotency-" in line}
        assert (len(server.requests), len(keys)) == (3, 1)
        with pytest.raises(ConnectionFailedError, match="1 try"):
            client.rollback()
    assert len(server.requests) == 4


def test_nobody_there_is_a_connection_that_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    for kind in (Client, AsyncClient):
        with pytest.raises(ConnectionFailedError, match="3 tries"):
            asyncio.run(called(kind, address))


async def called(kind: Any, address: str) -> Any:
    if kind is Client:
        with Client(address, retries=HASTY) as client:
            return client.rollback()  # nothing had left, so that it may be tried again
    async with AsyncClient(address, retries=HASTY) as client:
        return await client.rollback()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "not answered with JSON"),
        (b"[]", "Chart is not an object"),
        (b"{}", "Chart.recommendation_id is missing"),
        (CHART.replace(b"[]", b'[{"item_id": "a", "score": "1", "rank": 1}]'), r"items\[0\].score is not what"),
        (CHART.replace(b"[]", b'[{"item_id": "a", "score": 1, "rank": true}]'), r"items\[0\].rank is not what"),
    ],
)
def test_an_answer_of_something_else_is_told_as_such(script: Callable[..., Script], body: bytes, said: str) -> None:
    server = script(answer("200 OK", body))
    with Client(server.address) as client, pytest.raises(AnswerError, match=said):
        client.popular()


def test_a_refusal_that_is_no_problem_document_is_a_problem_too(script: Callable[..., Script]) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1))
    server = script(answer("403 Forbidden", b"<html>no</html>"), answer("503 Nope", b"[]", f"Retry-After: {date}"))
    with Client(server.address) as client:
        with pytest.raises(ProblemError) as refused:
            client.popular()
        assert (refused.value.status, refused.value.title, refused.value.errors) == (403, "Forbidden", ())
        with pytest.raises(UnavailableError) as later:  # an hour is more than `within`, so that it does not wait
            client.popular()
        assert later.value.retry_after is not None
        assert 3_500 < later.value.retry_after <= 3_600


@hypothesis.given(
    st.builds(Retries, tries=st.integers(1, 9), first_delay=st.floats(0, 1), max_delay=st.floats(1, 60)),
    st.integers(1, 10_000),
    st.none() | st.floats(0, 100),
)
def test_waits_double_vary_and_keep_what_was_asked(retries: Retries, failures: int, asked: float | None) -> None:
    longest = min(retries.max_delay, retries.first_delay * 2.0 ** min(failures - 1, 60))
    wait = retries.delay(failures, asked)
    assert (asked or 0) + longest / 2 <= wait <= (asked or 0) + longest


@pytest.mark.parametrize("wrong", [{"tries": 0}, {"first_delay": -1.0}, {"first_delay": 9.0, "max_delay": 1.0}])
def test_retries_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        Retries(**wrong)
