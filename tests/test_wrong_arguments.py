"""The Python surface with arguments that nobody can mean, and with some that are plainly meant."""

import numpy as np
import pandas as pd
import pytest
import torch

import pscope
from pscope import Decoding, Patchscope, States, Write, Writes, Writing, capture, overwriting, recording
from pscope.experiments.attribute_extraction import AttributeScores
from pscope.experiments.cross_model import CrossModel
from pscope.experiments.entity_resolution import EntityDescriptions, EntityLayers
from pscope.experiments.grid import layer_pairs, source_prompt
from pscope.experiments.layer_readout import LayerReadout
from pscope.experiments.multi_hop import MultiHop, MultiHopScores
from pscope.experiments.next_token import Lens, NextToken
from pscope.experiments.token_grid import TokenGrid
from pscope.inputs.entities import Entity, read_entities
from pscope.inputs.positions import draw_positions
from pscope.inputs.queries import Query
from pscope.inputs.relations import read_relations
from pscope.inputs.targets import named_target
from pscope.inputs.texts import read_texts
from pscope.mappings.mapping import Affine, Composed, Constant, KeepNorm, LowRank, Norm, Scale
from pscope.mappings.mapping_set import MappingSet
from pscope.metrics import answer_found, rouge_l, surprisal
from pscope.models.states import Label

CALLED = (
    *(AttributeScores, CrossModel, EntityDescriptions, EntityLayers, LayerReadout, MultiHop, MultiHopScores, NextToken),
    *(TokenGrid, Lens, draw_positions, layer_pairs, source_prompt, read_entities, read_relations, read_texts),
    *(
        Affine,
        Composed,
        Constant,
        KeepNorm,
        LowRank,
        Norm,
        Scale,
        answer_found,
        rouge_l,
        surprisal,
        Label,
        named_target,
    ),
)
"""What cases call beside the public names."""

WRONG = [
    ('load("no/such/model/anywhere")', "is neither a folder here, nor a hub id"),
    ('load("x", dtype="float8")', "unknown dtype 'float8'; one of float32, bfloat16, float16, auto"),
    ('load("x", dtype=torch.int64)', "unknown dtype torch.int64; one of float32"),
    ('load("x", device=1.5)', "the device '1.5' cannot be used"),
    ("load(model, tokenizer)", "is one of transformers; not LanguageModel("),
    ('load("")', "a model is named by a text or a path, or is one"),
    ("load(hf)", "a model in memory comes with its tokenizer:"),
    ('load(hf, tokenizer, adapter="a")', "put the adapter on it with peft before"),
    ('load("x", adapter="a", tensor_parallel=True)', "merge the adapter into the weights first"),
    ('load("x", device_map="auto", tensor_parallel=True)', "device_map and tensor_parallel were both given"),
    ('load("x", device_map="auto", device="cpu")', "device and device_map were both given; device"),
    ('load(hf, "tokenizer")', "a model and a tokenizer of transformers are"),
    ("load(torch.nn.Linear(2, 2), tokenizer)", "Linear is in training mode; call its eval() first"),
    ("load(hf.model, tokenizer)", "LlamaModel has no head that gives logits; give"),
    ("Patchscope(hf, prompt)", "a model is what pscope.load gives, not"),
    ("Patchscope(model, text)", "a prompt is needed, not 'one x two'; make one"),
    ("Patchscope(model, prompt, memory=0)", "the memory in bytes is 0; a whole number from 1"),
    ('Patchscope(model, prompt, path="fast")', "there is no path 'fast'; one of auto, staircase,"),
    ("Patchscope(model, beyond)", "'a' is token 99999999, and the embedding of"),
    ('Patchscope(model, Prompt("a", (1,), ("a",), (7,)))', "positions (7,) do not lie within a prompt of 1"),
    ('Patchscope(model, Prompt("a", (), (), (0,)))', "a prompt has a text and the ids of its tokens,"),
    ('Patchscope(model, Prompt("a", (1,) * 300, ("a",) * 300, (0,)))', "300 tokens are more than the window of"),
    ("scope.logits(None, 1)", "states are a tensor (rows, hidden), not None"),
    ("scope.logits(7, 1)", "states of torch.int64 are no hidden states; give"),
    ("scope.logits(vectors[0], 1)", "states of shape (32,) do not fit LlamaForCausalLM"),
    ("scope.logits(vectors[:0], 1)", "there is no state to patch"),
    ('scope.logits(vectors.to("meta"), 1)', "states on the meta device have no numbers; take"),
    ("scope.logits(vectors.to_sparse(), 1)", "states are held as torch.sparse_coo; give them as"),
    ("scope.logits(vectors * nan, 1)", "row 0 failed: its states are not finite in float32"),
    ("scope.logits(vectors)", "each state has a target layer; give one for all,"),
    ("scope.logits(vectors, 5)", "layer 5 is out of range: LlamaForCausalLM has"),
    ("scope.logits(vectors, [1])", "2 states came with 1 target layers; each state"),
    ("scope.logits(vectors, 1.0)", "layers are given as a list of numbers, as [0, 4,"),
    ("scope.generate(vectors, 1, 20)", "how rows go on is a Decoding, as Decoding(20),"),
    ("scope.generate(vectors, 1, Decoding(9999))", "10002 tokens are more than the window of"),
    ("scope.generate(vectors, 1, settled=7)", "settled is a function of a row and what it said,"),
    ('scope.generate("x", 1)', "states are a tensor (rows, hidden), not 'x'"),
    ("scope.generate(vectors, 9)", "layer 9 is out of range: LlamaForCausalLM has"),
    ('scope.score(vectors, 1, "")', "a continuation is a text with something in it,"),
    ("scope.score(vectors, 1, [])", "2 states came with 0 continuations; give one for"),
    ("scope.score(vectors, 1, None)", "None is neither a text nor tokens of"),
    ("scope.score(vectors, 1, 7)", "7 is neither a text nor tokens of"),
    ("scope.choose(vectors, 1, [])", "there are no candidates; give texts"),
    ('scope.choose(vectors, 1, " a")', "candidates are a list of texts, not ' a'"),
    ("scope.choose(vectors, 1, None)", "a list of candidates is needed, and None is none"),
    ('scope.choose(vectors, 1, [" a", ""])', "a continuation is a text with something in it,"),
    ('scope.choose(vectors, 1, [" a", " a"])', "the candidates ' a' and ' a' have the same"),
    ('scope.choose(vectors, 1, [" a", " b"], by="best")', "there is no measure 'best'; one of start, whole,"),
    ("scope.writes(vectors, 1, hold=[9])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("scope.writes(vectors, 1, hold=3)", "layers are given as a list of numbers, as [0, 4,"),
    ('scope.writes(vectors, 1, scale="2")', "scale is '2'; give a number, or a list of one for"),
    ("scope.writes(vectors, 1, scale=[1, 2, 3])", "2 states came with 3 scales; give one for all, or"),
    ("scope.writes(vectors, 1, scale=None)", "scale is None; give a number, or a list of one"),
    ("scope.relevance(vectors, 1, [[1]])", "2 states came with [[1]]; give the tokens that"),
    ("scope.relevance(vectors, 1, [[1], [99999999]])", "(99999999,) is neither a text nor tokens of"),
    ("scope.rows_per_pass(-1)", "new_tokens is -1; a whole number from 0 on is"),
    ("logit_lens(hf)", "a model is what pscope.load gives, not"),
    ("logit_lens(model, memory=0)", "the memory in bytes is 0; a whole number from 1"),
    ("capture(model, text)", "a list of prompts is needed, and 'one x two' is"),
    ("capture(model, [])", "there are no prompts; make them with"),
    ("capture(hf, [prompt])", "a model is what pscope.load gives, not"),
    ("capture(model, [prompt], -1)", "positions are a list for each of the 1 prompts,"),
    ("capture(model, [prompt], [[9]])", "positions [9] do not lie within a prompt of 3"),
    ('capture(model, [prompt], [["x"]])', "positions ['x'] do not lie within a prompt of 3"),
    ("capture(model, [prompt], [[True]])", "positions [True] do not lie within a prompt of 3"),
    ("capture(model, [prompt], layers=[])", "no layer is asked for"),
    ("capture(model, [prompt], layers=3)", "layers are given as a list of numbers, as [0, 4,"),
    ("capture(model, [prompt], layers=[9])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("capture(model, [prompt], batch_tokens=0)", "batch_tokens is 0; a whole number from 1 on is"),
    ("capture(model, [beyond])", "'a' is token 99999999, and the embedding of"),
    ('model.prompt("")', "the prompt is empty; give some text"),
    ("model.prompt(None)", "a prompt is one text, not None"),
    ('model.prompt(text, "y")', "'y' stands nowhere in the prompt; its tokens are"),
    ('model.prompt(text, "")', "'' stands nowhere in the prompt; its tokens are"),
    ("model.prompt(text, 9)", "position 9 is outside the prompt's 3 tokens:"),
    ("model.prompt(text, 1.0)", "1.0 is no position; give text of the prompt, an"),
    ("model.prompt(text, True)", "True is no position; give text of the prompt, an"),
    ("model.prompt(text, None)", "None is no position; give text of the prompt, an"),
    ("model.prompt(text, [])", "the positions [] of 'one x two' are none, or one"),
    ('model.prompt(text, b"x")', "b'x' is no position; give text of the prompt, an"),
    ('model.prompt(text, {"x": 1})', "{'x': 1} is no position; give text of the prompt,"),
    ("model.prompt(text, prompt)", "Prompt('one x two' at 1:' x') is no position;"),
    ("model.prompt(text, Every(7))", "Every takes a piece of the prompt's text, not 7"),
    ("model.prompt(text, First(7))", "First takes a piece of the prompt's text, not 7"),
    ('model.prompt("word " * 500)', "501 tokens are more than the window of"),
    ("model.prompt(chr(0xD800))", "the prompt '\\ud800' holds bytes that are not"),
    ('model.chat("hello")', "a chat is a list of messages, each with a role"),
    ('model.chat([{"role": "user", "content": "hi"}], at="nowhere")', "'nowhere' stands nowhere in the prompt;"),
    ("model.most_probable(vectors, 0)", "count is 0; a whole number from 1 on is needed"),
    ('model.most_probable(vectors, "x")', "count is 'x'; a whole number from 1 on is needed"),
    ('model.logits("x")', "ids are a tensor (batch, tokens) of whole"),
    ("model.logits(torch.ones(1, 0, dtype=torch.long))", "ids are a tensor (batch, tokens) of whole"),
    ("model.logits(torch.tensor([[99999999]]))", "go from 0 to"),
    ("model.next_token_logits(torch.tensor([[1, -1]]))", "some of these are others"),
    ('model.check_window("x")', "the number of tokens is 'x'; a whole number"),
    ("surprisal(torch.tensor([[9]]), vectors[:1, :9])", "tokens are numbered from 0 to 8"),
    ("surprisal(torch.tensor([[-1]]), vectors[:1, :9])", "tokens are numbered from 0 to 8"),
    ("surprisal(torch.tensor([1, 2]), vectors)", "token ids (samples, decodings) and logits"),
    ("surprisal(vectors, vectors)", "of torch.float32 and a Tensor of shape (2, 32)"),
    ("surprisal(torch.tensor([[1]]), vectors)", "token ids (samples, decodings) and logits"),
    ("named_target(None)", "a target is named by a text, not by None"),
    ('Reading(model, prompt, states, words=["one"])', "words are those for each text, as {text: words}"),
    ("Writes.of([])", "a row has one write at least"),
    ("Writes.of(None)", "rows are lists of Write(layer, position, vector),"),
    ('Writes.of([[Write("1", 1, vectors[0])]])', "the layer of a write is '1'; a whole number from"),
    ('Writes.of([[Write(1, "x", vectors[0])]])', "its position is 'x'; a whole number from 0 on is"),
    ("Writes.of([[Write(1, 1, vectors)]])", "a write has a vector (hidden,), all of one width;"),
    ("Writes.of([[Write(1, 1, None)]])", "vectors are a tensor (rows, hidden), not None"),
    ("scope.logits(Writes.of([[Write(1, 0, vectors[0])]]))", "position 0 is not marked in the target, where [1]"),
    ("scope.logits(Writes.of([[Write(1, 1, vectors[0].long())]]))", "vectors of torch.int64 are no hidden"),
    ("scope.logits(Writes.of([[Write(1, 1, vectors[0][:7])]]))", "vectors of width 7 do not fit a model of"),
    ("scope.logits(Writes.of([[Write(1, 1, vectors[0])]]), 1)", "writes have layers of their own; leave the"),
    ("scope.logits(Writes(vectors, torch.tensor([1, 1]), torch.tensor([1, 1])))", "writes are vectors (rows,"),
    ("Writes(vectors[:, None].numpy(), [[1], [1]], [[1], [1]])", "writes are vectors (rows, writes, hidden), at"),
    ("Writing(hold=3) and Reading(model, prompt, states, writing=Writing(hold=3))", "layers are given as a list"),
    ("Writing(scales=())", "scales are finite numbers, one at least; not ()"),
    ("Writing(scales=(1, 1))", "one of the scales [1, 1] is given twice"),
    ("Reading(hf, prompt, states)", "a model is what pscope.load gives, not"),
    ("Reading(model, text, states)", "a prompt is needed, not 'one x two'; make one"),
    ("Reading(model, prompt, vectors)", "States are read, not a Tensor of shape (2, 32);"),
    ("Reading(model, prompt, states[:0])", "there is no state to read"),
    ("Reading(model, prompt, states, [])", "no layer is asked for"),
    ('Reading(model, prompt, states, "all")', "layers are given as a list of numbers, as [0, 4,"),
    ("Reading(model, prompt, states, [9])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("Reading(model, prompt, states, decoding=20)", "how rows go on is a Decoding, as Decoding(20),"),
    ("Reading(model, prompt, states, times=0)", "times is 0; a whole number from 1 on is needed"),
    ("Reading(model, prompt, states, times=2)", "2 times are asked for; once is always the same"),
    ("Reading(model, prompt, states, top_k=0)", "top_k is 0; a whole number from 1 to 49152 is"),
    ("Reading(model, prompt, states, seed=-1)", "the seed is -1; a whole number from 0 to"),
    ("Reading(model, prompt, states, memory=0)", "the memory in bytes is 0; a whole number from 1"),
    ('Reading(model, prompt, states, writing={"norm": True})', "how vectors are written is a Writing, as"),
    ("Reading(model, prompt, states, mappings=Affine(eye))", "a MappingSet, as read_mappings gives, is needed,"),
    ('Reading(model, prompt, states, words={"one": ""})', "the words for 'one' are ''; give a text"),
    ('Reading(model, prompt, States(vectors, ("a", "b")))', "'a' is of no layer, so that none is the same;"),
    ('Reading(model, prompt, States(vectors[:, :7], ("a", "b")), [1])', "vectors of width 7 do not fit"),
    ("States(vectors, ())", "there are no labels; give texts"),
    ("States(vectors, None)", "a list of labels is needed, and None is none of"),
    ('States(vectors[0], (Label("a"),))', "1 labels do not fit vectors of shape (32,):"),
    ("States(None, ())", "vectors are a tensor (rows, hidden), not None"),
    ('States(vectors.long(), ("a", "b"))', "vectors of torch.int64 are no hidden states; give"),
    ("States.of(model, text)", "a list of prompts is needed, and 'one x two' is"),
    ("States.of(model, [])", "there are no prompts; make them with"),
    ("States.of(hf, [prompt])", "a model is what pscope.load gives, not"),
    ("States.of(model, [prompt], [[9]])", "positions [9] do not lie within a prompt of 3"),
    ("States.of(model, [prompt], [9])", "positions are a list for each of the 1 prompts,"),
    ('States.of(model, [prompt], [["x"]])', "positions ['x'] do not lie within a prompt of 3"),
    ("States.of(model, [prompt], layers=[9])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("States.of(model, [prompt], layers=[])", "no layer is asked for"),
    ("States.of(model, [prompt], layers=3)", "layers are given as a list of numbers, as [0, 4,"),
    ("states[99]", "99 are no rows of States(5 of width 32, layers 0"),
    ('states["x"]', "'x' are no rows of States(5 of width 32, layers 0"),
    ("states[None]", "None are no rows of States(5 of width 32, layers"),
    ("states[torch.tensor([True])]", "a Tensor of shape (1,) are no rows of States(5 of"),
    ("states[states]", "States(5 of width 32, layers 0 to 4: 'one x two')"),
    ("states.at(9)", "there is no state of layer 9 among States(5 of"),
    ("states[:0].mean()", "there is no state to take the mean of"),
    ('states + "x"', "states (5, 32) are combined with states, numbers,"),
    ("states.map(None)", "states are mapped by a function of (rows,"),
    ("states.map(lambda x: None)", "vectors are a tensor (rows, hidden), not None"),
    ("states.map(lambda x: x[:1])", "5 labels do not fit vectors of shape (1, 32):"),
    ("states.map(Affine(torch.eye(7)))", "states of shape (5, 32) were given to a mapping"),
    ("states.to_file(None)", "a file or folder is named by a text or a"),
    ('states.to_file(folder / "x.pt")', "x.pt: name a file that ends with .safetensors"),
    ('states.to_file("x")', "x: name a file that ends with .safetensors"),
    ('states.to_file(folder / "ok.safetensors")', "ok.safetensors is there already; name a new file"),
    ('states.to_file(folder / "ok.safetensors" / "more.safetensors")', "more.safetensors: File exists; name"),
    ("States.from_file(None)", "a file or folder is named by a text or a"),
    ('States.from_file(folder / "none.safetensors")', "none.safetensors: it is not there"),
    ('States.from_file(folder / "none.pt")', "none.pt is neither .safetensors nor .npy; save"),
    ('States.from_file(folder / "ok.safetensors", "x")', "ok.safetensors has no tensor 'x'; it holds states"),
    ("Decoding(0)", "new_tokens is 0; a whole number from 1 on is"),
    ("Decoding(temperature=-1)", "temperature is -1; 0 is greedy, a number above 0"),
    ("Decoding(seed=-1)", "the seed is -1; a whole number from 0 to"),
    ('Decoding(stop=",")', "stop is ','; strings are needed, none of them empty"),
    ("Decoding(stop=None)", "stop is None; strings are needed, none of them empty"),
    ("scope.generate(vectors, 1, Decoding(2, 1.0, seed=2**70))", "the seed is 1180591620717411303424; a whole"),
    ("scope.generate(vectors, 1, Decoding(2, stop=(7,)))", "stop is (7,); strings are needed, none of them empty"),
    ('list(continue_prompts(model, "one"))', "a list of prompts is needed, and 'one' is none of"),
    ("list(continue_prompts(model, []))", "there are no prompts; make them with"),
    ("list(continue_prompts(hf, [prompt]))", "a model is what pscope.load gives, not"),
    ("list(continue_prompts(model, [prompt], 20))", "how rows go on is a Decoding, as Decoding(20),"),
    ("list(continue_prompts(model, [prompt], Decoding(2), memory=0))", "the memory in bytes is 0; a whole"),
    ('list(continue_prompts(model, [prompt], Decoding(2), path="fast"))', "there is no path 'fast'; one of"),
    ("list(continue_prompts(model, [prompt], Decoding(9999)))", "10002 tokens are more than the window of"),
    ("list(continue_prompts(model, [beyond], Decoding(2)))", "'a' is token 99999999, and the embedding of"),
    ("list(continue_prompts(model, [prompt], Decoding(2), settled=True))", "settled is a function of a row and"),
    ("lens(hf, text)", "a model is what pscope.load gives, not"),
    ("lens(model, None)", "a prompt is one text, not None"),
    ('lens(model, "")', "the prompt is empty; give some text"),
    ("lens(model, text, [])", "no layer is asked for"),
    ("lens(model, text, [9])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("lens(model, text, 3)", "layers are given as a list of numbers, as [0, 4,"),
    ("lens(model, text, [1, 1])", "one of the lenses ['logit lens', 'token"),
    ("lens(model, text, [1], top_k=0)", "top_k is 0; a whole number from 1 to 49152 is"),
    ('lens(model, text, [1], top_k="x")', "top_k is 'x'; a whole number from 1 to 49152 is"),
    ("lens(model, text, [1], describe=True)", "how rows go on is a Decoding, as Decoding(20),"),
    ("lens(model, text, [1], describe=Decoding(9999))", "10029 tokens are more than the window of"),
    ("lens(model, text, [1], mappings=Affine(eye))", "mappings are given by name, as {'tuned':"),
    ('lens(model, text, [1], mappings={"a": Affine(eye)})', "a MappingSet, as read_mappings gives, is needed,"),
    ("run_page(None)", "a file or folder is named by a text or a"),
    ('run_page("nowhere")', "nowhere is no run: cannot read"),
    ("run_page(folder)", "settings.json: No such file or directory"),
    ('run_page(folder / "ok.safetensors")', "settings.json: Not a directory"),
    ("figure(None)", "a figure is drawn of a table, a pandas.DataFrame,"),
    ("figure(pd.DataFrame())", "a table without rows has no figure"),
    ('figure(pd.DataFrame({"a": [1]}))', "no figure belongs to a table of the columns a"),
    ('figure(pd.DataFrame({"lens": ["a"], "correct": [True]}))', "the table has no column 'text', which its"),
    ("within(recording(model, [9]))", "layer 9 is out of range: LlamaForCausalLM has"),
    ("within(recording(model, 3))", "layers are given as a list of numbers, as [0, 4,"),
    ("within(recording(model, []))", "no layer is asked for"),
    ("within(recording(hf, [1]))", "a model is what pscope.load gives, not"),
    ("within(editing(model, {9: lambda x: x}))", "layer 9 is out of range: LlamaForCausalLM has"),
    ("within(editing(model, {1.5: lambda x: x}))", "layers are given as a list of numbers, as [0, 4,"),
    ("within(editing(model, {1: None}))", "edits are functions by layer, as {8: double}, not"),
    ("within(editing(hf, {1: lambda x: x}))", "a model is what pscope.load gives, not"),
    ("within(editing(model, {1: lambda x: 7}))", "the edit of layer 1 gave 7 for a stream (1, 3, 32)"),
    ("within(overwriting(model, 9, 1, vectors[0]))", "layer 9 is out of range: LlamaForCausalLM has"),
    ("within(overwriting(model, 1.5, 1, vectors[0]))", "layers are given as a list of numbers, as [0, 4,"),
    ('within(overwriting(model, 1, "x", vectors[0]))', "the position is 'x'; a whole number from"),
    ("within(overwriting(model, 1, -99, vectors[0]))", "position -99 does not lie within a pass of 3"),
    ("within(overwriting(model, 1, 1, None))", "vectors are a tensor (rows, hidden), not None"),
    ("within(overwriting(model, 1, 1, vectors[0, :7]))", "vectors of shape (7,) do not fit"),
    ("within(overwriting(model, 1, 1, vectors))", "vectors for 2 rows do not fit a pass of 1; give"),
    ("within(overwriting(model, 1, 1, vectors[0].long()))", "vectors of torch.int64 are no hidden states; give"),
    ("within(overwriting(model, 1, 1, vectors[0] * nan))", "row 0 failed: its numbers are not finite in"),
    ('within(overwriting(model, 1, 1, vectors[0].to("meta")))', "numbers on the meta device have no numbers;"),
    ("within(overwriting(hf, 1, 1, vectors[0]))", "a model is what pscope.load gives, not"),
    ("Affine(None)", "the weight of Affine is a Tensor, not None"),
    ("Affine(eye)(vectors[:, :7])", "states of shape (2, 7) were given to a mapping"),
    ('Affine(eye)("x")', "states are a tensor (rows, hidden), not 'x'"),
    ("LowRank(torch.ones(32, 2), None)", "the down of LowRank is a Tensor, not None"),
    ('Scale("x")(vectors)', "the factor of Scale is a float | Tensor, not 'x'"),
    ("Scale(vectors[0, :7])(vectors)", "states of shape (2, 32) were given to a mapping"),
    ('Norm("x")(vectors)', "the length of Norm is a float, not 'x'"),
    ("Constant(None)(vectors)", "the state of Constant is a Tensor, not None"),
    ("KeepNorm(None)(vectors)", "the mapping of KeepNorm is a Mapping, not None"),
    ("Composed(None)(vectors)", "the steps of Composed is a tuple[Mapping, ...],"),
    ("Composed((None,))", "the steps of Composed is a tuple[Mapping, ...],"),
    ("Norm(1.0).then(None)", "the steps of Composed is a tuple[Mapping, ...],"),
    ('Norm(1.0).to("tpu")', "the device 'tpu' cannot be used"),
    ("Affine(vectors[0])", "the weight of Affine is (width out, width in), and"),
    ("Affine(eye, eye[0, :3])", "the bias of Affine is (width out), and a tensor of shape (3,)"),
    ("LowRank(eye[:, :2], eye[:3])", "the down of LowRank is (rank, width in), and a"),
    ("LowRank(eye[:, :2], eye[:2], None, eye[0, :3])", "the scale of LowRank is (width out), and a"),
    ("Scale(eye)", "the factor of Scale is (width), and a tensor of"),
    ("Constant(vectors[0, 0])", "the state of Constant is (width out), and a tensor"),
    ("Constant(vectors)", "the state of Constant is (width out), and a tensor"),
    ("MappingSet({}, None)", "there is a mapping for each pair of layers, as"),
    ("maps.at((2, 2))", "there is no map for the layers (2, 2); these map"),
    ("MappingSet.identity(model, [1, 2])", "pairs are a source and a target layer each, as"),
    ("MappingSet.identity(hf, [(1, 1)])", "a model is what pscope.load gives, not"),
    ("MappingSet.identity(model, [(1, 9)])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("maps.check(hf, hf)", "a model is what pscope.load gives, not"),
    ("maps.to_means()", "no mean state of layer 1 was kept with these"),
    ('save_mappings(None, folder / "maps")', "a MappingSet, as read_mappings gives, is needed,"),
    ("save_mappings(maps, None)", "a file or folder is named by a text or a"),
    ('save_mappings(maps, folder / "maps1")', "maps1 is not empty; name a new folder"),
    ('read_mappings(folder / "maps1", hf)', "a model is what pscope.load gives, not"),
    ("read_mappings(None, model)", "a file or folder is named by a text or a"),
    ('rouge_l(["a"], ["a", "b"])', "1 predictions came with 2 references; each has one"),
    ('rouge_l([1], ["a"])', "a list of texts is needed, and 1 is none of them;"),
    ('answer_found("a", None)', "answers are texts that may stand in one, not None"),
    ("LayerReadout(hf, prompt, prompt, [1])", "a model is what pscope.load gives, not"),
    ("LayerReadout(model, text, prompt, [1])", "a prompt is needed, not 'one x two'; make one"),
    ("LayerReadout(model, prompt, prompt, [])", "no layer is asked for"),
    ("LayerReadout(model, prompt, prompt, 3)", "layers are given as a list of numbers, as [0, 4,"),
    ("LayerReadout(model, prompt, prompt, [9])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("LayerReadout(model, prompt, prompt, [1], top_k=0)", "top_k is 0; a whole number from 1 to 49152 is"),
    ('LayerReadout(model, prompt, prompt, [1], top_k="x")', "top_k is 'x'; a whole number from 1 to 49152 is"),
    ("LayerReadout(model, prompt, prompt, [1], new_tokens=0)", "new_tokens is 0; a whole number from 1 on is"),
    ("LayerReadout(model, prompt, prompt, [1], memory=0)", "the memory in bytes is 0; a whole number from 1"),
    ("LayerReadout(model, prompt, model.prompt(text, [0, 1]), [1])", "2 positions of 'one x two' are marked"),
    ("EntityDescriptions(model, prompt, [], [(1, 1)])", "there are no entities; give Entity(name,"),
    ('EntityDescriptions(model, prompt, ["Syria"], [(1, 1)])', "a list of entities is needed, and 'Syria' is"),
    ("EntityDescriptions(model, prompt, [entity], [])", "pairs are a source and a target layer each, as"),
    ("EntityDescriptions(model, prompt, [entity], [(1, 9)])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("EntityDescriptions(model, prompt, [entity], [(1, 1)], 20)", "how rows go on is a Decoding, as"),
    ("EntityDescriptions(model, prompt, [entity], [(1, 1)], seed=-1)", "the seed is -1; a whole number from 0"),
    ("EntityDescriptions(model, prompt, [entity], [(1, 1)], memory=0)", "the memory in bytes is 0; a whole"),
    ("EntityDescriptions(hf, prompt, [entity], [(1, 1)])", "a model is what pscope.load gives, not"),
    ('EntityDescriptions(model, "x", [entity], [(1, 1)])', "a prompt is needed, not 'x'; make one with"),
    ('EntityLayers(model, prompt, "Syria", [(1, 1)])', "a prompt is needed, not 'Syria'; make one with"),
    ('EntityLayers(model, prompt, prompt, [(1, 1)], reference="")', "the description to score against:"),
    ("EntityLayers(model, prompt, prompt, [])", "pairs are a source and a target layer each, as"),
    ("EntityLayers(model, prompt, prompt, [(9, 1)])", "layer 9 is out of range: LlamaForCausalLM has"),
    ('layer_pairs(model, [1], "some")', "layers are given as a list of numbers, as [0, 4,"),
    ("layer_pairs(model, [1], [])", "no layer is asked for"),
    ("layer_pairs(hf, [1])", "a model is what pscope.load gives, not"),
    ("source_prompt(model, None)", "a prompt is one text, not None"),
    ('source_prompt(model, "one", 1.5)', "1.5 is no position; give text of the prompt, an"),
    ('source_prompt(hf, "one")', "a model is what pscope.load gives, not"),
    ("TokenGrid(model, prompt, [])", "there are no lenses; give Lens(name, target)"),
    ('TokenGrid(model, prompt, ["logit lens"])', "a list of lenses is needed, and 'logit lens' is"),
    ("TokenGrid(model, text, [one_lens])", "a prompt is needed, not 'one x two'; make one"),
    ("TokenGrid(model, prompt, [one_lens], [])", "no layer is asked for"),
    ('NextToken(model, [], ["one two"], sampled, [1])', "there are no lenses; give Lens(name, target)"),
    ('NextToken(model, [Lens("x")], ["one two"], sampled, [])', "no layer is asked for"),
    ('NextToken(model, [Lens("x")], ["one two"], sampled, 3)', "layers are given as a list of numbers, as [0,"),
    ('draw_positions(model, ["one two"], 0, 0)', "the number of samples is 0; a whole number from 1"),
    ('draw_positions(model, ["one two"], 99, 0)', "99 samples were asked for, but the 1 texts have"),
    ('draw_positions(model, ["one two"], 1, -1)', "the seed is -1; a whole number from 0 to"),
    ("draw_positions(model, [], 1, 0)", "there are no texts; give strings"),
    ("draw_positions(model, [7], 1, 0)", "a list of texts is needed, and 7 is none of them;"),
    ('draw_positions(hf, ["one two"], 1, 0)', "a model is what pscope.load gives, not"),
    ('read_entities("nowhere.json")', "cannot read nowhere.json: No such file or"),
    ("read_entities(None)", "a file or folder is named by a text or a"),
    ('read_texts("nowhere.txt")', "cannot read nowhere.txt: No such file or directory"),
    ("read_texts(None)", "a file or folder is named by a text or a"),
    ('read_relations("nowhere.tsv")', "cannot read nowhere.tsv: No such file or directory"),
    ("MultiHopScores(model, [], [(1, 1)])", "there are no queries; give Query(first, second,"),
    ('MultiHopScores(model, ["q"], [(1, 1)])', "a list of queries is needed, and 'q' is none of"),
    ('MultiHopScores(model, [], [(1, 1)], by="x")', "there is no measure 'x'; one of start, whole, mean"),
    ("MultiHopScores(model, queries, [1])", "pairs are a source and a target layer each, as"),
    ("MultiHopScores(model, queries, [(1, 9)])", "layer 9 is out of range: LlamaForCausalLM has"),
    ("MultiHopScores(model, queries, [(1, 1)], seed=-1)", "the seed is -1; a whole number from 0 to"),
    ("MultiHop(model, [], [(1, 1)])", "there are no queries; give Query(first, second,"),
    ("AttributeScores(model, [], [(1, 1)])", "there are no questions; make them of relations"),
    ('AttributeScores(model, ["q"], [(1, 1)])', "a list of questions is needed, and 'q' is none of"),
    ('AttributeScores(model, None, [(1, 1)], by="x")', "there is no measure 'x'; one of start, whole, mean"),
    ('CrossModel(model, model, prompt, {}, ["one"], [], [(1, 9)])', "layer 9 is out of range: LlamaForCausalLM"),
    ("EntityDescriptions(model, prompt, [entity], [(1.5, 1)])", "layers are given as a list of numbers, as [0,"),
]


@pytest.fixture(scope="module")
def names(tiny, tmp_path_factory):
    """What the calls are made of."""
    prompt = tiny.prompt("one x two", "x")
    states = States.of(tiny, prompt)
    folder = tmp_path_factory.mktemp("files")
    states.to_file(folder / "ok.safetensors")
    maps = MappingSet.identity(tiny, [(1, 1)])
    pscope.save_mappings(maps, folder / "maps1")

    def within(block):
        with block:
            tiny.logits(torch.tensor([prompt.ids]))

    return {
        **{name: getattr(pscope, name) for name in pscope.__all__},
        **{each.__name__: each for each in CALLED},
        **{"torch": torch, "np": np, "pd": pd, "nan": float("nan"), "eye": torch.eye(32), "within": within},
        **{"model": tiny, "hf": tiny.hf, "tokenizer": tiny.tokenizer, "prompt": prompt, "text": prompt.text},
        **{"vectors": torch.randn(2, 32), "states": states, "scope": Patchscope(tiny, prompt)},
        **{"folder": folder, "maps": maps, "entity": Entity("Syria", "a country"), "one_lens": Lens("one")},
        "beyond": pscope.Prompt("a", (99999999,), ("a",), (0,)),
        "queries": [Query("a", "b", ("c",)), Query("d", "b", ("e",))],
        "sampled": draw_positions(tiny, ["one two"], 1, 0),
    }


def hooks(model) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.hf.modules())


@pytest.mark.parametrize(("call", "told"), WRONG, ids=[call for call, _ in WRONG])
def test_what_cannot_be_meant_is_told_where_it_enters(names, call, told):
    standing = hooks(names["model"])
    with pytest.raises(pscope.PscopeError) as refused:
        eval(call, names)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert hooks(names["model"]) == standing


def test_layers_of_any_kind(tiny, names):
    prompt, vectors, scope = (names[name] for name in ("prompt", "vectors", "scope"))
    expected = capture(tiny, [prompt], layers=[1, 3])
    for layers in (range(1, 4, 2), (1, 3), np.array([1, 3]), torch.tensor([1, 3]), [np.int64(1), torch.tensor(3)]):
        assert capture(tiny, [prompt], layers=layers).equal(expected)
        assert [label.layer for label in States.of(tiny, prompt, layers=layers).labels] == [1, 3]
        assert layer_pairs(tiny, layers) == [(1, 1), (3, 3)]
        with recording(tiny, layers) as streams:
            tiny.logits(torch.tensor([prompt.ids]))
        assert list(streams) == [1, 3]
    (one,) = scope.logits(vectors, [2, 2])
    for layer in (2, np.int64(2), torch.tensor(2), np.array([2, 2]), torch.tensor([2, 2])):
        (same,) = scope.logits(vectors, layer)
        assert same.patched.equal(one.patched)
    assert Writing(2.0, hold=np.array([1])) == Writing((2.0,), hold=(1,))


def test_prompts_and_positions_of_any_kind(tiny, names):
    prompt = names["prompt"]
    assert capture(tiny, prompt).equal(capture(tiny, [prompt]))
    assert capture(tiny, (each for each in [prompt])).equal(capture(tiny, [prompt]))
    expected = capture(tiny, [prompt], [[0, 1]])
    for positions in (np.array([[0, 1]]), torch.tensor([[0, -2]]), [range(2)]):
        assert capture(tiny, [prompt], positions).equal(expected)
    for at in (np.int64(-2), torch.tensor(1), np.array([1]), [np.int64(1)]):
        assert tiny.prompt("one x two", at) == prompt
    assert tiny.prompt("one x two", range(2)).positions == (0, 1)
    assert dict(pscope.continue_prompts(tiny, prompt, Decoding(2))).keys() == {0}


def test_vectors_of_any_kind(tiny, names):
    vectors, scope, prompt = (names[name] for name in ("vectors", "scope", "prompt"))
    (expected,) = scope.logits(vectors, 2)
    for same in (vectors.numpy(), list(vectors), vectors.tolist(), States(vectors, ["a", "b"])):
        assert next(scope.logits(same, 2)).patched.equal(expected.patched)
    rows = [[Write(np.int64(2), torch.tensor(1), vector.numpy())] for vector in vectors]
    assert next(scope.logits(Writes.of(rows), None)).patched.equal(expected.patched)
    with overwriting(tiny, torch.tensor(2), np.int64(1), vectors[0].numpy()):
        logits = tiny.next_token_logits(torch.tensor([prompt.ids]))
    torch.testing.assert_close(logits[0], expected.patched[0], rtol=1e-4, atol=1e-4)


def test_texts_and_tokens_of_any_kind(names):
    vectors, scope = names["vectors"], names["scope"]
    expected = scope.score(vectors, 1, [(5,), (6,)]).patched.log_probabilities
    for tokens in (torch.tensor([[5], [6]]), [np.array([5]), [6]]):
        assert scope.score(vectors, 1, tokens).patched.log_probabilities.equal(expected)
    chosen = scope.choose(vectors, 1, [" a", " b"])
    for candidates in (np.array([" a", " b"]), pd.Series([" a", " b"]), (" a", " b")):
        assert scope.choose(vectors, 1, candidates).patched.scores.equal(chosen.patched.scores)
    assert not answer_found("it creates jobs", "Jobs")
    assert answer_found("it was Steve Jobs", "Jobs")


def test_equal_seeds_of_any_kind_draw_the_same(tiny, names):
    assert Decoding(np.int64(2), np.float64(1.0), torch.tensor(3), [","]) == Decoding(2, 1.0, 3, (",",))
    one, same = (
        pscope.Reading(tiny, names["prompt"], names["states"][2], decoding=Decoding(2), seed=seed).table()
        for seed in (3, np.int64(3))
    )
    pd.testing.assert_frame_equal(one, same)


def test_rows_of_states_and_what_they_are_combined_with(names):
    states = names["states"]
    for rows in ((0, 2), np.array([0, 2]), torch.tensor([0, 2]), range(0, 3, 2), slice(0, 3, 2)):
        assert [label.layer for label in states[rows].labels] == [0, 2]
    assert [each.labels[0].layer for each in states] == [0, 1, 2, 3, 4]
    for twice in (2 * states, states * np.float32(2), np.float32(2) * states, states + states.vectors):
        assert twice.vectors.equal(2 * states.vectors)
    assert (states - states.vectors[0].numpy()).vectors[0].abs().max() == 0


def test_paths_as_texts(names, tiny, tmp_path):
    states, folder = names["states"], names["folder"]
    states.to_file(str(tmp_path / "kept.safetensors"))
    assert States.from_file(str(tmp_path / "kept.safetensors")).labels == states.labels
    pscope.save_mappings(names["maps"], str(tmp_path / "maps"))
    for path in (folder / "maps1", str(tmp_path / "maps")):
        assert pscope.read_mappings(path, tiny).maps.keys() == {(1, 1)}
    (tmp_path / "texts.txt").write_text("one two")
    assert read_texts(str(tmp_path / "texts.txt")) == ["one two"]
