"""The text demo's search and learning, on drawn embeddings; its corpus; its page's server."""

from __future__ import annotations

import http.client
import json
import threading

import helpers_text
import numpy as np
import pytest
from helpers_text import WIDTH, Sentences

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("threadpoolctl")

import lora_engine as le
from lora_engine.text_demo import corpus, reloaded, search, users
from lora_engine.text_demo.serve import MOST_BYTES, Server
from lora_engine.text_demo.session import MOST_CHARACTERS, Session


@pytest.fixture(scope="module")
def text():
    return users.text()


@pytest.fixture(scope="module")
def world():
    return helpers_text.world()


# ---- the text ----


def test_passages_are_the_documentations_own(text):
    from pydoc_data.topics import topics

    passages, queries = text
    assert len(passages) > 800
    assert len(queries) > 300
    for p in passages:
        whole = " ".join(topics[p.topic].split())
        assert p.words in whole
        assert p.query in whole
        assert not p.query or p.query not in p.words
    assert len({(p.query, p.text) for p in passages}) == len(passages)


def test_sections_are_whole_and_no_part_shares_one(text):
    passages, queries = text
    parts = {}
    for q in queries:
        assert parts.setdefault(passages[q.passage].section, q.part) == q.part
    assert set(parts.values()) == set(corpus.PARTS)
    sizes = np.bincount([p.section for p in passages])
    assert sizes.min() >= 1
    assert sizes.max() == corpus.SECTION


def test_wanted_is_of_the_section_and_to_the_taste(text):
    passages, queries = text
    for taste in corpus.TASTES[:-1]:
        found = corpus.wanted(passages, queries, taste)
        assert found.sum() > 100, taste
        for q, at in np.argwhere(found)[::5]:
            assert passages[at].section == passages[queries[q].passage].section
            assert taste.likes.search(passages[at].text)
        q = int(np.flatnonzero(~found.any(axis=1))[0])
        here = passages[queries[q].passage].section
        assert not any(taste.likes.search(p.text) for p in passages if p.section == here)
    plain = corpus.wanted(passages, queries, corpus.TASTES[-1])
    assert np.argwhere(plain).tolist() == [[i, q.passage] for i, q in enumerate(queries)]


# ---- the search ----


def test_the_gradient_of_a_click_is_the_losses():
    rng = np.random.default_rng(1)
    index = rng.standard_normal((30, 7)).astype(np.float32)
    q = rng.standard_normal(7)
    results = search.search(index, q.astype(np.float32), 6)
    assert results.passages.tolist() == np.argsort(-(index @ q))[:6].tolist()
    clicked = int(results.passages[3])

    def loss(at):
        logits = index[results.passages].astype(float) @ at / search.TEMPERATURE
        peak = logits.max()
        return search.TEMPERATURE * (peak + np.log(np.exp(logits - peak).sum()) - logits[3])

    step = 1e-5 * np.eye(7)
    numeric = [(loss(q + e) - loss(q - e)) / 2e-5 for e in step]
    np.testing.assert_allclose(
        search.click_gradient(index, results, clicked)[0], numeric, atol=2e-4
    )
    with pytest.raises(ValueError, match="shown"):
        search.click_gradient(index, results, int(np.argmin(index @ q)))


def test_ranks_and_ties_are_never_flattering():
    index = np.eye(4, dtype=np.float32)
    queries = np.array([[4, 3, 2, 1], [1, 1, 1, 1], [np.nan] * 4], np.float32)
    wanted = np.zeros((3, 4), bool)
    wanted[0, 1] = wanted[0, 3] = wanted[1, 0] = wanted[2, 0] = True
    assert search.ranks(index, queries, wanted).tolist() == [2, 4, 4]
    assert search.Quality.of(np.array([1, 2, 4, 1])) == (0.5, 0.6875)


def test_every_taste_is_learned_and_no_other_users_slot_changes(world):
    pool = users.new_pool(WIDTH)
    A, B, scaling = pool.get(0)
    other = pool.add(A, B, scaling)
    slots = [pool.add(A, B, scaling) for _ in corpus.TASTES]
    for taste, slot in zip(corpus.TASTES, slots, strict=True):
        learned = users.learn(world, taste.name, pool, slot, lr=0.3)
        before, after = learned.curve[0], learned.curve[-1]
        if taste.likes is not None:
            assert after.mrr > before.mrr + 0.1, taste
        assert len(learned.adapt) == learned.clicks[-1]
        at = world.having(taste.name, "held out")
        assert {world.queries[q].part for q in at} == {"held out"}
        assert len(learned.ranks) == len(at)
    for kept, was in zip(pool.get(other), (A, B, scaling), strict=True):
        np.testing.assert_array_equal(kept, was)


# ---- the page's server ----


@pytest.fixture
def server(world, tmp_path):
    with reloaded.open_store(tmp_path, WIDTH) as store:
        made = Server(0)
        made.session = Session(world, Sentences(), store)
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()
        made.server_close()


def ask(server, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if data is not None else {}
    sent = kind | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if data is None else "POST", path, data, sent)
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    return answer.status, json.loads(said) if path != "/" or answer.status != 200 else said


def test_clicks_teach_that_user_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    query = {"user": "grammar", "query": "what is a name"}
    status, found = ask(server, "/search", query)
    assert status == 200
    assert [r["was"] for r in found["results"]] == list(range(1, 11))  # fresh: the frozen model's
    chosen = found["results"][4]["passage"]
    for clicks in range(1, 26):
        status, said = ask(server, "/click", query | {"passage": chosen})
        assert status == 200
        assert len(said["mrr"]) == len(said["recall"]) == clicks + 1
        assert said["us"] > 0
    assert ask(server, "/search", query)[1]["results"][0]["passage"] == chosen
    others = ask(server, "/search", query | {"user": "plain"})[1]
    assert others["results"] == found["results"]
    assert len(ask(server, "/state?user=plain")[1]["mrr"]) == 1
    assert server.session._encoder.asked == 1


def test_what_a_user_would_click_is_learned(server):
    for _ in range(30):
        status, said = ask(server, "/simulate", {"user": "history"})
        assert status == 200
    assert said["query"]
    assert len(said["mrr"]) == 31
    assert said["mrr"][-1] > said["mrr"][0]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/", None, {"Host": "evil.example"}, 403),
        ("/", None, {"Host": "127.0.0.1"}, 403),  # another port
        ("/state", None, {"Host": "evil.example:80"}, 403),
        ("/search", {"user": "plain", "query": "a"}, {"Origin": "http://evil.example"}, 403),
        ("/search", {"user": "plain", "query": "a"}, {"Origin": "null"}, 403),
        ("/click", b"user=plain", {"Content_Type": "text/plain"}, 415),
        ("/click", b"x" * (MOST_BYTES + 1), {}, 413),
        ("/click", b"", {"Content_Length": "9" * 30}, 413),
        ("/click", b"{}", {"Content_Length": "-1"}, 411),
        ("/click", b"{", {}, 400),
        ("/click", b"[" * 4000, {}, 400),
        ("/click", b"[]", {}, 400),
        ("/click", {"user": "plain", "query": "a", "passage": "0"}, {}, 400),
        ("/click", {"user": "plain", "query": "a", "passage": True}, {}, 400),
        ("/click", {"user": "plain", "query": "a", "passage": -1}, {}, 400),
        ("/search", {"user": "nobody", "query": "a"}, {}, 400),
        ("/search", {"user": "plain", "query": " "}, {}, 400),
        ("/search", {"user": "plain", "query": "a" * (MOST_CHARACTERS + 1)}, {}, 400),
        ("/search", {"user": "plain"}, {}, 400),
        ("/state?user=nobody", None, {}, 400),
        ("/../serve.py", None, {}, 404),
        ("/other", {}, {}, 404),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(server, path, body, headers, status):
    store = server.session.store
    before = [store.pool.version(store.slot(t.name)) for t in corpus.TASTES]
    got, said = ask(server, path, body, **headers)
    assert got == status, said
    assert said["error"]
    assert [store.pool.version(store.slot(t.name)) for t in corpus.TASTES] == before
    assert ask(server, "/")[0] == 200


def test_what_was_learned_is_kept(world, tmp_path):
    for turn in range(2):
        with reloaded.open_store(tmp_path, WIDTH) as store:
            session = Session(world, Sentences(), store)
            first = session.state("errors")["mrr"][0]
            if turn == 0:
                last = [session.simulate("errors")["mrr"][-1] for _ in range(20)][-1]
    assert first == last
    assert isinstance(store, le.AdapterStore)
