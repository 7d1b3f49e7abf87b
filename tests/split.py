"""What a model says, whole or held by several processes together."""

import torch
from accelerate import PartialState

import pscope
from pscope.models.fingerprint import fingerprint
from pscope.runs.processes import Processes


def said(model: pscope.LanguageModel) -> dict[str, object]:
    """Logits, continuations and states at all layers."""
    source = model.prompt("Amazon's former CEO attended the Oscars", "CEO")
    states, layers = pscope.capture(model, [source])[0], range(model.n_layers + 1)
    scope = pscope.Patchscope(model, model.prompt("one two x three", "x"))
    return {
        "states": states,
        "logits": torch.cat([part.patched for part in scope.logits(states, layers)]),
        "spoken": scope.generate(states, layers, pscope.Decoding(6)).patched,
        "path": scope.path,
        "fingerprint": fingerprint(model),
    }


def said_together(*folders_and_file: str) -> None:
    """Run by several processes that hold each model together: what it says, into a file, by the models' folders."""
    state = PartialState(cpu=True)
    *folders, file = folders_and_file
    assert Processes("cpu").least(5 + state.process_index) == Processes("cpu").least(7 - state.process_index) - 1 == 5
    found = {folder: said(pscope.load(folder, device="cpu", tensor_parallel=True)) for folder in folders}
    if state.is_main_process:
        torch.save(found, file)
