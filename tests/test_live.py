"""The live demo: what it asks of a model, and what its server and its command refuse. `test_browser_live` drives it."""

import re
import socket
import sys
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import without_a_number
from pscope.cli.app import app
from reference import hidden_states, written_continuation, written_logits
from typer.testing import CliRunner

from pscope.engine.patchscope import Patchscope
from pscope.errors import PscopeError
from pscope.inputs.targets import shipped_targets
from pscope.show.live import MOST_TOKENS, Demo, Row, Spoken, grid_html, live, refused_html, said_html

TEXT, TARGET = "one two three four", "say x and x now"
HOSTILE = "<script>alert(1)</script>\u202e\x1b[31m"


@pytest.mark.parametrize(("position", "layer", "target_layer"), [(2, 3, 1), (4, 0, 0), (1, 4, 3)])
def test_what_is_said_is_what_whole_prompts_say(demo, tiny, position, layer, target_layer):
    spoken = demo.say(TEXT, position, layer, TARGET, "all:x", target_layer, 6)
    source, target = tiny.prompt(f"\n{TEXT}"), tiny.prompt(TARGET)
    state = hidden_states(tiny.hf, tiny.layers, source.ids)[layer, position]
    places = [place for place, token in enumerate(target.tokens) if token == " x"]
    writes = [(target_layer, place, state) for place in places]
    assert len(writes) == 2
    assert spoken.token == source.tokens[position]
    assert [row.condition for row in spoken.rows] == ["patched", "random vector", "clean target"]
    for row, written in ((spoken.rows[0], writes), (spoken.rows[2], [])):
        said = written_continuation(tiny.hf, tiny.layers, target.ids, written, 6)
        assert row.continuation == tiny.tokenizer.decode(said)
        expected = written_logits(tiny.hf, tiny.layers, target.ids, written)[-1].softmax(dim=-1).topk(5)
        assert [token for token, _ in row.next_tokens] == [tiny.tokenizer.decode([each]) for each in expected.indices]
        assert [of for _, of in row.next_tokens] == pytest.approx(expected.values.tolist(), rel=1e-4)
    assert len({row.continuation for row in spoken.rows}) == 3


def test_the_random_vector_has_the_length_of_the_state(demo, monkeypatch):
    written = []
    logits = Patchscope.logits

    def noted(scope, states, target_layer):
        written.append(states)
        return logits(scope, states, target_layer)

    monkeypatch.setattr(Patchscope, "logits", noted)
    first, again = (demo.say(TEXT, 2, 3, "say x", "x", 3, 2) for _ in range(2))
    assert first.rows == again.rows
    state, random = written[0]
    assert torch.allclose(state.norm(), random.norm())
    assert abs(torch.cosine_similarity(state, random, dim=0)) < 0.8


def test_the_grid_is_of_all_tokens_and_layers(demo, tiny):
    grid = demo.grid(TEXT)
    prompt = tiny.prompt(f"\n{TEXT}")
    assert list(zip(grid["position"], grid["layer"], strict=True)) == [
        (position, layer) for position in range(len(prompt)) for layer in range(tiny.n_layers + 1)
    ]
    own = tiny.hf(torch.tensor([prompt.ids])).logits[0].argmax(dim=-1)
    assert grid[grid["layer"] == tiny.n_layers]["next_token"].tolist() == [tiny.tokenizer.decode([t]) for t in own]
    html = grid_html(grid.assign(next_token=[f"{p}.{k}" for p, k in zip(grid["position"], grid["layer"], strict=True)]))
    cells = re.findall(r'<td data-position="(\d+)" data-layer="(\d+)"[^>]*>([^<]*)</td>', html)
    assert len(cells) == len(grid)
    assert all(f"{position}.{layer}" == told for position, layer, told in cells)
    assert re.findall(r'<th scope="row">(\d)</th>', html) == ["4", "3", "2", "1", "0"]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"text": ""}, "the prompt is empty"),
        ({"text": "x" * 1001}, "the text has 1001 characters; 1000 are the most here"),
        ({"text": " one" * 64}, "the text has 65 tokens; 64 are the most here"),
        ({"target": " say" * 65, "at": "last"}, "the target prompt has 65 tokens; 64 are the most here"),
        ({"target": "x" * 1001}, "the target prompt has 1001 characters"),
        ({"at": "z"}, "'z' stands nowhere in the prompt"),
        ({"at": "x"}, "'x' stands 2 times"),
        ({"position": 5}, "the token is 5; it is a whole number from 0 to 4"),
        ({"position": None}, "the token is None"),
        ({"layer": 5}, "the layer is 5; it is a whole number from 0 to 4"),
        ({"target_layer": -1}, "the target layer is -1"),
        ({"new_tokens": 51}, "the number of new tokens is 51; it is a whole number from 1 to 50"),
    ],
)
def test_limits(demo, changed, told):
    where = {"position": 2, "layer": 3, "target_layer": 3}
    asked = {"text": TEXT, "target": TARGET, "at": "all:x", "new_tokens": 2, **where}
    before = demo.say(**asked)
    with pytest.raises(PscopeError, match=re.escape(told)) as refused:
        demo.say(**asked | changed)
    assert "\n" not in str(refused.value)
    assert demo.say(**asked) == before


def test_all_shipped_targets_fit(demo):
    for target in shipped_targets().values():
        spoken = demo.say(TEXT, 2, 3, target.text, target.at, 3, 1)
        assert len(spoken.target) <= MOST_TOKENS


def test_a_row_that_fails_leaves_the_next_alone(tiny):
    demo = Demo(tiny)
    token = tiny.prompt(" two").ids[0]
    with without_a_number(tiny, token), pytest.raises(PscopeError, match="not finite"):
        demo.say(TEXT, 2, 3, "say two x", "x", 3, 2)
    assert demo.say(TEXT, 2, 3, "say two x", "x", 3, 2).rows[0].continuation


def test_a_text_is_read_once(tiny, monkeypatch):
    demo, read = Demo(tiny), []
    from pscope.show import live as module

    capture = module.capture
    monkeypatch.setattr(module, "capture", lambda *asked: read.append(asked[1]) or capture(*asked))
    demo.grid(TEXT)
    for layer in (1, 2):
        demo.say(TEXT, 2, layer, "say x", "x", layer, 1)
    assert len(read) == 1


def test_texts_of_a_model_are_shown_as_text(demo, tiny):
    row = Row("patched", HOSTILE, [(HOSTILE, 0.5)])
    spoken = Spoken(HOSTILE, tiny.prompt(f"{HOSTILE} x", "x"), [row])
    grid = demo.grid(HOSTILE)
    for html in (
        said_html(spoken, 1, 1, 1),
        refused_html(HOSTILE),
        grid_html(grid.assign(token=HOSTILE, next_token=HOSTILE)),
    ):
        assert "<script" not in html
        assert not set("\u202e\x1b") & set(html)
        assert "&lt;script&gt;" in html
        assert r"\u202e\u001b[31m" in html


def test_the_placeholder_is_marked_in_the_target(demo):
    html = said_html(demo.say(TEXT, 2, 3, "say x and x", "all:x", 3, 1), 2, 3, 3)
    assert 'say <mark>x</mark> and <mark>x</mark></span><span class="continuation">' in html


@pytest.mark.parametrize(
    "path",
    [
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=https://example.com/",
        "gradio_api/proxy=https://example.hf.space/",
        "gradio_api/upload",
        "gradio_api/%75pload",
        "gradio_api/openapi.json",
        "gradio_api/runs",
        "openapi.json",
        "docs",
    ],
)
def test_the_server_has_no_way_to_files(address, path):
    asked = Request(address + path)
    if "pload" in path:
        asked.data = b"--b\r\nContent-Disposition: form-data; name=files; filename=f\r\n\r\nx\r\n--b--\r\n"
        asked.add_header("Content-Type", "multipart/form-data; boundary=b")
    with pytest.raises(HTTPError) as refused:
        urlopen(asked)
    assert refused.value.code == 404
    assert urlopen(address).status == 200


def test_one_line_for_all_that_runs_the_model(tiny):
    page = live(tiny)
    queued = [event for event in page.fns.values() if event.queue]
    assert {event.concurrency_id for event in queued} == {"model"}
    assert (page._queue.default_concurrency_limit, page._queue.max_size) == (1, 16)
    assert {event.api_visibility for event in page.fns.values()} == {"private"}
    assert page.analytics_enabled is False


def test_without_gradio_one_line(monkeypatch):
    def loaded(*asked, **options):
        raise AssertionError("a model was loaded first")

    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr("pscope.models.loading.load", loaded)
    result = CliRunner().invoke(app, ["app"])
    assert result.exit_code == 2
    assert result.stderr == 'pscope: the live demo needs Gradio; pip install "pscope[app]"\n'


@pytest.mark.usefixtures("loaded_once")
def test_a_port_that_is_taken_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["app", "--port", str(port)])
    assert result.exit_code == 2
    assert result.stderr == f"pscope: port {port} is taken, or not allowed; give another by --port\n"
    assert result.stdout == ""


@pytest.mark.parametrize("port", ["0", "65536", "one"])
def test_a_port_that_is_none(port):
    result = CliRunner().invoke(app, ["app", "--port", port])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("loaded_once")
def test_it_listens_on_the_loopback_address_and_ends_quietly(monkeypatch):
    import gradio

    launched = []

    def launch(page, **options):
        launched.append(options)
        return None, "http://127.0.0.1:7860/", None

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(gradio.Blocks, "launch", launch)
    monkeypatch.setattr("pscope.cli.live.time.sleep", interrupted)
    monkeypatch.setenv("GRADIO_SHARE", "True")
    result = CliRunner().invoke(app, ["app"])
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "http://127.0.0.1:7860/ (Ctrl-C ends it)\n"
    assert launched[0]["server_name"] == "127.0.0.1"
    assert launched[0]["share"] is False
    assert launched[0]["allowed_paths"] == []
    assert CliRunner().invoke(app, ["app", "--share"]).exit_code == 0
    assert launched[1]["share"] is True
