"""Affine mappings fitted in closed form: one pass over texts for all layers, in memory that their number leaves alone.

The paper's section 4.1 (to the last layer: the "tuned lens" of Figure 2) and 4.4 (into another model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pscope.engine.lens import logit_lens
from pscope.engine.patchscope import Patchscope
from pscope.errors import PscopeError
from pscope.inputs.positions import Paired, Sampled
from pscope.mappings.mapping import IDENTITY, Affine, Mapping
from pscope.mappings.mapping_set import FOLDS, End, MappingSet, Origin, fold_of
from pscope.mappings.moments import Fitted, Moments, check_enough, sums_bytes
from pscope.models.fingerprint import digest
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import Pair, as_layers, capture

CHUNK = 2**28
"""About how many bytes of states are held while they are added up."""

SUMS = 2**32
"""About how many bytes of sums are held: where all layers need more, the texts are read several times."""


@dataclass(frozen=True)
class Fit:
    """What is fitted: affine maps of least squares for `pairs` of layers, from `source` to `target`.

    With `into`, the state that is to come out is not that of the text: it is the state at the marked position of this
    prompt, in the place of whose token the model's own next token stands. With `shuffled`, a seed, states are paired
    with others' than their own: a control. `ridge` is beside features of variance 1; None chooses it.
    """

    source: LanguageModel
    target: LanguageModel
    pairs: tuple[Pair, ...]
    into: Prompt | None = None
    ridge: float | None = None
    shuffled: int | None = None

    def __post_init__(self) -> None:
        if self.ridge is not None and not 0 <= self.ridge < float("inf"):
            raise PscopeError(f"a ridge of {self.ridge} cannot be meant; give a number from 0 on")
        for end, model in ((0, self.source), (1, self.target)):
            as_layers(model, [pair[end] for pair in self.pairs])

    @property
    def same(self) -> bool:
        """Whether states are those of one model at one place."""
        return self.source is self.target and self.into is None and self.shuffled is None

    def check(self, paired: Sequence[Paired]) -> None:
        """Raise PscopeError if the positions are too few, before any is read."""
        check_enough(sum(len(each.source.positions) for each in paired), self.source.hidden_size)

    def run(
        self, texts: Sequence[str], paired: Sequence[Paired], progress: Callable[[int], None] = lambda done: None
    ) -> MappingSet:
        """The maps, fitted on `paired` positions of `texts`, cross-fitted over folds of whole texts.

        `progress` is told how many positions have been read. A layer is mapped to itself by the identity. Raises
        PscopeError for too few positions, states that are not finite, and what else `Moments.fit` refuses.
        """
        self.check(paired)
        positions = sum(len(each.source.positions) for each in paired)
        pairs = [pair for pair in self.pairs if not (self.same and pair[0] == pair[1])]
        if not pairs:
            raise PscopeError("every layer is mapped to itself, which needs no fit; name others")
        fits: dict[Pair, Fitted] = {}
        means: dict[int, Tensor] = {}
        groups = self._groups(pairs)
        for number, group in enumerate(groups):
            moments = Moments(group, self.source.hidden_size, self.target.hidden_size, self.source.device)
            for x, y, of in self._states(paired, moments.sources, moments.targets):
                moments.add(x, y, torch.tensor([fold_of(texts[text]) for text in of]))
                progress((number * positions + moments.positions) // len(groups))
            fits |= {pair: _single(moments.fit(pair, self.ridge)) for pair in group}
            means |= {layer: moments.mean(layer).float().cpu() for layer in moments.targets}
            # Those of the next group would stand beside them.
            del moments
        identities: dict[Pair, Mapping] = {pair: IDENTITY for pair in self.pairs if pair not in fits}
        origin = Origin(
            kind="affine",
            source=End.of(self.source),
            target=End.of(self.target),
            texts=len(paired),
            positions=positions,
            data_sha256=digest(texts),
            ridge={pair: of.ridge for pair, of in fits.items()},
            r2={pair: of.r2 for pair, of in fits.items()},
            settings={"into": self.into and self.into.text, "shuffled": self.shuffled is not None},
        )
        folds = (identities | {pair: of.folds[fold] for pair, of in fits.items()} for fold in range(FOLDS))
        maps = identities | {pair: of.whole for pair, of in fits.items()}
        return MappingSet(maps, origin, tuple(folds), means)

    def _groups(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """The pairs in groups whose sums fit in the memory for them, those of a source layer together where they do."""
        own, theirs = sums_bytes(self.source.hidden_size, self.target.hidden_size)
        groups: list[list[Pair]] = []
        room = 0
        for pair in sorted(pairs):
            size = theirs if groups and groups[-1][-1][0] == pair[0] else own + theirs
            if size > room:
                groups.append([])
                room, size = SUMS, own + theirs
            groups[-1].append(pair)
            room -= size
        return groups

    def _states(
        self, paired: Sequence[Paired], sources: list[int], targets: list[int]
    ) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """States x and y, (positions, layers, width), and the text of each, chunk by chunk."""
        bytes_each = 4 * (len(sources) * self.source.hidden_size + len(targets) * self.target.hidden_size)
        random = None if self.shuffled is None else torch.Generator().manual_seed(self.shuffled)
        for part in _chunks(paired, max(1, CHUNK // bytes_each)):
            own = [each.source for each in part]
            x, y = self._read(own, [each.target for each in part], sources, targets)
            if random is not None:
                y = y[torch.randperm(len(y), generator=random).to(y.device)]
            yield x, y, [each.text for each in own for _ in each.positions]

    def _read(
        self, own: list[Sampled], theirs: list[Sampled], sources: list[int], targets: list[int]
    ) -> tuple[Tensor, Tensor]:
        def states(model: LanguageModel, items: list[Sampled], layers: list[int]) -> Tensor:
            return capture(model, [item.prompt for item in items], [item.positions for item in items], layers)

        if self.into is not None:
            last = self.source.n_layers
            both = states(self.source, own, [*sources, last])
            return both[:, :-1], _written_into(self.target, self.into, self._next_tokens(both[:, -1]), targets)
        if self.source is self.target:
            union = sorted({*sources, *targets})
            both = states(self.source, own, union)
            x, y = (both[:, [union.index(layer) for layer in layers]] for layers in (sources, targets))
            return x, y
        return states(self.source, own, sources), states(self.target, theirs, targets)

    @cached_property
    def _lens(self) -> Patchscope:
        return logit_lens(self.source)

    def _next_tokens(self, last_states: Tensor) -> list[int]:
        """What the source itself goes on with, from the states of its last layer."""
        logits = self._lens.logits(last_states, self.source.n_layers)
        return torch.cat([part.patched.argmax(dim=-1) for part in logits]).tolist()


def _written_into(model: LanguageModel, target: Prompt, tokens: list[int], layers: list[int]) -> Tensor:
    """The states at the target's marked position with each token in its place: (tokens, layers, width)."""
    place, each = target.position, sorted(set(tokens))
    # What follows cannot be seen from there.
    before, texts = target.ids[:place], target.tokens[:place]
    prompts = [Prompt(target.text, (*before, token), (*texts, ""), (place,)) for token in each]
    states = capture(model, prompts, layers=layers)
    return states[[each.index(token) for token in tokens]]


def _chunks(paired: Sequence[Paired], positions: int) -> Iterator[list[Paired]]:
    """Texts of like lengths with about so many positions together."""
    chunk: list[Paired] = []
    for each in sorted(paired, key=lambda each: len(each.source.prompt)):
        if chunk and sum(len(one.source.positions) for one in [*chunk, each]) > positions:
            yield chunk
            chunk = []
        chunk.append(each)
    if chunk:
        yield chunk


def _single(fit: Fitted) -> Fitted:
    """The same maps in single precision, on the CPU."""

    def single(mapping: Affine) -> Affine:
        bias = None if mapping.bias is None else mapping.bias.float().cpu()
        return Affine(mapping.weight.float().cpu(), bias)

    return replace(fit, whole=single(fit.whole), folds=tuple(map(single, fit.folds)))
