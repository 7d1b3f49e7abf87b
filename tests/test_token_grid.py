import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from conftest import run
from reference import hidden_states, patched_continuation, patched_logits
from test_unpatched import greedy

import pscope
from pscope import Affine, DataError, Decoding, MappingSet, PscopeError
from pscope.experiments.next_token import Lens
from pscope.experiments.token_grid import TokenGrid, grid_of
from pscope.show.lens_page import lens_page

TEXT = "\none two"
HOSTILE = "a </script><script>alert(1)</script> <!-- & \"' \u202e\u001b[31m z"


@pytest.fixture
def lenses(tiny):
    identity = Lens("identity", tiny.prompt("cat -> cat\n?"))
    return [Lens("logit lens"), identity, Lens("described", tiny.prompt("say x"), decoding=Decoding(4))]


def test_every_cell_against_one_row_passes(tiny, lenses):
    prompt = tiny.prompt(TEXT)
    table = TokenGrid(tiny, prompt, lenses, top_k=3).table()
    own = hidden_states(tiny.hf, tiny.layers, prompt.ids)  # (layers, tokens, hidden)
    with torch.no_grad():
        answers = tiny.hf(torch.tensor([prompt.ids])).logits[0].argmax(dim=-1).tolist()
    cells = table[table["position"].notna()]
    assert len(cells) == 3 * len(prompt) * 5 * 3
    for (name, position, layer), rows in cells.groupby(["lens", "position", "layer"]):
        state = own[layer, position]
        if name == "logit lens":
            with torch.no_grad():
                logits = tiny.hf.lm_head(tiny.hf.model.norm(state))
        else:
            target = next(lens.target for lens in lenses if lens.name == name)
            where = (tiny.hf, tiny.layers, target.ids, target.position, layer, state)
            logits = patched_logits(*where)[-1]
        probabilities = logits.softmax(dim=-1)
        top = probabilities.topk(3)
        assert rows["probability"].tolist() == pytest.approx(top.values.tolist(), abs=1e-5)
        assert rows["next_token"].tolist() == [tiny.tokenizer.decode([token]) for token in top.indices.tolist()]
        first = rows.iloc[0]
        assert first["entropy"] == pytest.approx(-(probabilities * probabilities.log()).nansum().item(), abs=1e-3)
        rank = 1 + int((probabilities > probabilities[answers[position]]).sum())
        assert (first["answer_rank"], first["token"]) == (rank, prompt.tokens[position])
        if name == "described":
            assert first["continuation"] == tiny.tokenizer.decode(patched_continuation(*where, 4))
        else:
            assert pd.isna(first["continuation"])
    clean = table[table["position"].isna() & (table["rank"] == 1)].set_index("lens")
    assert list(clean.index) == ["identity", "described"]
    said = greedy(tiny, tiny.prompt("say x").ids, 4)
    assert clean["continuation"]["described"] == tiny.tokenizer.decode(said)
    assert clean["next_token"]["described"] == tiny.tokenizer.decode(said[:1])


def test_maps_to_other_layers_are_read_by_the_prompt_of_token_identity(tiny):
    maps = MappingSet.identity(tiny, [(1, 3)])
    twice = Affine(2 * torch.eye(32))
    maps.maps.update({(1, 3): twice, (2, 3): twice})
    grid = grid_of(tiny, "one two", [1, 2, 4], mappings={"maps": maps})
    table = grid.table()
    rows = table[(table["lens"] == "maps") & (table["rank"] == 1)].dropna(subset="layer")
    assert set(rows["layer"]) == {1, 2}
    target = tiny.prompt(pscope.TOKEN_IDENTITY)
    own = hidden_states(tiny.hf, tiny.layers, grid.prompt.ids)
    for row in rows.itertuples():
        logits = patched_logits(tiny.hf, tiny.layers, target.ids, target.position, 3, 2 * own[row.layer, row.position])[
            -1
        ]
        assert row.probability == pytest.approx(logits.softmax(dim=-1).max().item(), abs=1e-5)
    with pytest.raises(PscopeError, match=r"maps reads none of the layers \[0, 4\]"):
        grid_of(tiny, "one two", [0, 4], mappings={"maps": maps})


def test_a_lens_of_maps_reads_the_layers_that_they_lead_from(tiny):
    maps = MappingSet.identity(tiny, [(2, 4)])
    maps.maps[2, 4] = Affine(2 * torch.eye(32))
    table = TokenGrid(tiny, tiny.prompt(TEXT), [Lens("maps", mappings=maps)], top_k=1).table()
    assert set(table["layer"]) == {2}
    page = lens_page(table, "maps", {}, 100)
    assert page.count("<td") > 3


def test_memory_changes_nothing(tiny, lenses):
    whole, tight = (TokenGrid(tiny, tiny.prompt(TEXT), lenses, memory=memory).table() for memory in (2**30, 1))
    pd.testing.assert_frame_equal(whole, tight, atol=1e-4)


def test_what_cannot_be_looked_at_is_told(tiny, lenses):
    prompt = tiny.prompt(TEXT)
    for options, told in (
        ({"lenses": []}, "there are no lenses"),
        ({"layers": []}, "no layer is asked for"),
        ({"layers": [9]}, "layer 9 is out of range"),
        ({"top_k": 0}, "top_k is 0"),
        ({"layers": [1, 1]}, "given twice"),
        ({"lenses": lenses[:1] * 2}, "given twice"),
    ):
        with pytest.raises(PscopeError, match=told):
            TokenGrid(tiny, prompt, **{"lenses": lenses, **options})


def page_of(model, text, lenses, **made):
    return lens_page(TokenGrid(model, model.prompt(text), lenses).table(), text, made, model.config.vocab_size)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_lens_goes_on_greedily_from_a_prompt(tiny):
    for target, decoding in ((None, Decoding(3)), (tiny.prompt("x"), Decoding(3, temperature=1.0))):
        with pytest.raises(PscopeError, match="a lens goes on greedily, from the prompt that it patches"):
            Lens("x", target, decoding=decoding)


def test_a_tie_goes_to_the_models_own_answer(tiny):
    grid = grid_of(tiny, "one")
    logits = torch.zeros(1, 8)
    (cell,) = grid._top(logits, torch.tensor([5]))
    assert cell[0]["answer_rank"] == 1


def test_a_hostile_text_is_shown_as_text(tiny, lenses):
    page = page_of(tiny, HOSTILE, lenses, command=HOSTILE)
    assert page.count("<script") == 2
    assert page.count("</script>") == 2
    assert "alert(1)" in page
    assert not {"\u202e", "\u001b"} & set(page)
    # A character that is several tokens stands in each of them.
    shown = "".join(data_of(page)["tokens"])
    assert shown.startswith("a </script><script>alert(1)</script> <!-- & \"' ")
    assert shown.endswith("\\u202e\\u001b[31m z")


def test_a_page_asks_for_nothing_from_elsewhere(tiny, lenses):
    page = page_of(tiny, TEXT, lenses)
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttp|https?://(?!www\.w3\.org/2000/svg)""", page)
    # Without a script it is a table with headers, and what the first lens says.
    assert page.count('<th scope="col"') == 1 + 3
    assert page.count('<th scope="row"') == 5 + 1
    assert page.count('<td tabindex="-1" style="--v:') == 3 * 5


def test_the_command_leaves_a_page(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "lens",
        "one two",
        "--model",
        str(tiny_folder),
        "--layers",
        "0,2,4",
        "--new-tokens",
        "3",
        "--out",
        "run",
    ]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "page: run/page.html" in result.stderr
    data = data_of((tmp_path / "run" / "page.html").read_text("utf-8"))
    assert data["tokens"] == ["⏎", "one", " two"]
    assert data["layers"] == [0, 2, 4]
    assert [lens["name"] for lens in data["lenses"]] == ["logit lens", "token identity", "entity description"]
    (tmp_path / "run" / "page.html").unlink()
    assert run("resume", "run").exit_code == 0
    assert (tmp_path / "run" / "page.html").exists()
    dry = run(*arguments[:-1], "dry", "--dry-run", "--rate", "1")
    assert (dry.exit_code, (tmp_path / "dry").exists()) == (0, False), dry.output
    for share in ("1/2", "2/2"):
        assert run(*arguments[:-1], "shares", "--shard", share).exit_code == 0
    joined = run("resume", "shares")
    assert joined.exit_code == 0, joined.output
    tables = [pd.read_parquet(tmp_path / name / "table.parquet") for name in ("run", "shares")]
    pd.testing.assert_frame_equal(*tables, atol=1e-5)
    quick = run(*arguments[:-1], "json", "--no-describe", "--json")
    assert {row["lens"] for row in json.loads(quick.stdout)} == {"logit lens", "token identity"}
    refused = run("lens", "", "--model", str(tiny_folder))
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_a_page_shows_itself_in_a_notebook_and_is_kept(tiny, tmp_path):
    page = pscope.lens(tiny, HOSTILE, [0, 4], describe=Decoding(2), top_k=2)
    frames = []

    class Frames(HTMLParser):
        def handle_starttag(self, tag, attributes):
            frames.append((tag, dict(attributes)))

    Frames().feed(page._repr_html_())
    ((tag, attributes),) = frames
    assert (tag, attributes["srcdoc"], attributes["sandbox"]) == ("iframe", page.html, "allow-scripts")
    assert set(page.table()["lens"]) == {"logit lens", "token identity", "entity description"}
    assert repr(page) == f"Page(title={HOSTILE!r})"
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == page.html
    with pytest.raises(DataError, match="is there already"):
        page.save(tmp_path / "page.html")
