import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads of several workers that wait for each other cost more than they do.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from huggingface_hub import constants
from matplotlib.figure import Figure
from pscope.cli.app import app
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import pscope

# A shell that starts the tests in the background has Ctrl-C ignored, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONG = {
    *("test_adding", "test_architectures", "test_bad_input", "test_benchmarks", "test_cli", "test_experiment_commands"),
    *("test_lens_commands", "test_processes", "test_readme", "test_recipes", "test_resume", "test_tour"),
}
"""The files that take whole commands, processes or pages of the documentation, or every architecture."""

AS_IT_COMES = {("dtype", "auto"), ("device", "cpu")}
"""Options of a model that nothing is asked of, beside those that are not given."""


def pytest_addoption(parser):
    parser.addoption("--write-models", action="store_true", help="Write the table of docs/models.md anew.")


def pytest_collection_modifyitems(items):
    """Fast ones first, so that most faults show within seconds."""
    for item in items:
        long = item.path.stem in LONG
        if long:
            item.add_marker("long")
        if long or "smollm2" in item.fixturenames or item.get_closest_marker("browser"):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("long") is not None)


@pytest.fixture(scope="session")
def smollm2() -> pscope.LanguageModel:
    """The real default model, fetched the first time it is needed."""
    return pscope.load("smollm2", device="cpu")


@pytest.fixture(scope="session")
def tokenizers() -> dict[tuple[bytes, ...], PreTrainedTokenizerFast]:
    """Those that were loaded, by what stands in their files."""
    return {}


@pytest.fixture
def loaded_once(smollm2, tokenizers, monkeypatch) -> None:
    """Many commands in one process load what is there already, and need not wait for it.

    The default model as it comes is the one that is there; of folders with the same tokenizer, the first one's is used.
    """
    load = pscope.load

    def loaded(model="smollm2", *more, **options):
        asked = {(name, value) for name, value in options.items() if value not in (None, False)}
        if more:
            return load(model, *more, **options)
        if model == "smollm2" and asked <= AS_IT_COMES:
            return smollm2
        files = [Path(model) / name for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
        content = tuple(file.read_bytes() for file in files if file.is_file())
        if not content:
            return load(model, **options)
        read = load(model, tokenizers.get(content), **options)
        tokenizers.setdefault(content, read.tokenizer)
        return read

    monkeypatch.setattr("pscope.models.loading.load", loaded)


@pytest.fixture
def unpainted(monkeypatch) -> None:
    """Figures are made and saved, but not painted: that takes longer than all else that a tiny model is asked for."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: Path(path).touch())


@pytest.fixture(scope="session")
def demo(tiny):
    """The live demo of the tiny model."""
    from pscope.show.live import Demo

    return Demo(tiny)


@pytest.fixture(scope="session")
def address(tiny):
    """Where a server of that demo listens."""
    from pscope.show.live import live

    page = live(tiny)
    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    yield address
    page.close(verbose=False)


@pytest.fixture(scope="session")
def browser():
    """Chromium, which must be there."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "no Chromium is installed; Debian's package is called chromium"
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def from_disk(browser, tmp_path):
    """What opens a page from disk; at the end nothing has gone wrong in it, and it has asked for nothing."""
    contexts, faults, asked, there = [], [], [], []

    def opened(html):
        path = tmp_path / f"page{len(there)}.html"
        path.write_text(html, "utf-8")
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 900}))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        there.append(path.as_uri())
        return page

    yield opened
    assert faults == []
    assert asked == there
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    return smollm2.tokenizer


@pytest.fixture(scope="session")
def bos_eos_tokenizer(tokenizer):
    """The default tokenizer, made to put a BOS before and an EOS after every text."""
    backend = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    copy = type(backend.backend_tokenizer).from_str(backend.backend_tokenizer.to_str())
    copy.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=copy, bos_token="<|im_start|>", eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def tiny(tokenizer) -> pscope.LanguageModel:
    """A random Llama of 4 layers that reads the default model's tokens."""
    return random_model(LlamaForCausalLM, LlamaConfig, tokenizer)


@pytest.fixture
def silent_hub(monkeypatch) -> Iterator[socket.socket]:
    """A hub that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        silent.settimeout(1)
        yield silent


@pytest.fixture
def tiny_folder(tiny, tmp_path) -> Path:
    folder = tmp_path / "tiny"
    tiny.hf.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_folder(tokenizer, tmp_path_factory) -> Path:
    """A wider, shallower model that reads the same tokens."""
    other = random_model(LlamaForCausalLM, LlamaConfig, tokenizer, hidden_size=48, num_hidden_layers=3)
    folder = tmp_path_factory.mktemp("models") / "other"
    other.hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CAPITALS = {"Japan": "Tokyo", "France": "Paris", "Germany": "Berlin", "Egypt": "Cairo", "Portugal": "Lisbon"}
FOODS = {"sushi": "Japan", "baguette": "France", "a pretzel": "Germany", "koshari": "Egypt"}


@pytest.fixture
def relations(tmp_path) -> Path:
    """Two relations that compose."""
    folder = tmp_path / "relations"
    folder.mkdir()
    for name, template, phrase, pairs in (
        ("capital", "The capital city of {} is", None, CAPITALS),
        ("food", "The country of origin of {} is", "the country of origin of {}", FOODS),
    ):
        samples = [
            {"subject": subject, "object": answer, "contexts": [f"We saw {subject} then.", f"It was {subject}."]}
            for subject, answer in pairs.items()
        ]
        record = {"name": name, "kind": "factual", "template": template, "phrase": phrase, "samples": samples}
        (folder / f"{name}.json").write_text(json.dumps(record))
    return folder


TEXTS = [
    "The lighthouse keeper counted eleven ships before the fog came in over the bay.",
    "Water boils at a lower temperature on a mountain than it does beside the sea.",
    "She had promised to return the ladder on Monday, and on Friday it was still leaning on her wall.",
]


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS), "utf-8")
    return path


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("COLUMNS", "80")


@contextmanager
def without_a_number(model: pscope.LanguageModel, token: int) -> Iterator[None]:
    """Within the block, the model embeds one token as NaN."""
    weights = model.hf.get_input_embeddings().weight.data
    kept = weights[token].clone()
    weights[token] = float("nan")
    try:
        yield
    finally:
        weights[token] = kept


def random_model(model_class, config_class, tokenizer, **options) -> pscope.LanguageModel:
    """A random model of 4 layers and width 32, with logits of a spread that tells tokens apart."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **options})).eval()
    return pscope.load(model, tokenizer)


def rows_for_every_layer(model, seed=0, per_layer=2):
    """Random states of the size of the model's own, for every target layer, in no order."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(per_layer) for layer in range(model.n_layers + 1)]
    order = torch.randperm(len(layers)).tolist()
    spread = pscope.capture(model, [model.prompt("the size of a state")])[0].std()
    return torch.randn(len(layers), model.hidden_size) * spread, [layers[i] for i in order]


def run(*arguments) -> Result:
    """What comes of a command as a user types it, in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
