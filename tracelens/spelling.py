"""What the tokens of a row spell, character by character, so that a text can be found in them.

Tokens are cut out of text in ways of their own: a word carries the space before it, a character of several bytes may
be spread over several tokens, a special token stands for text that nobody wrote. A :class:`Spelling` knows where each
token begins and ends, and which of these places lie inside a character.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # how decoders write bytes that do not make a whole character


@dataclass(frozen=True, slots=True)
class Spelling:
    """The text that n tokens spell, and where each of them ends.

    Token ``i`` spells ``surface`` from ``cuts[i]`` to ``cuts[i + 1]``. Cuts count half characters: ``2 * k`` is the
    place before character ``k``, ``2 * k + 1`` lies somewhere inside it. ``special`` are the tokens that stand for no
    text of the prompt, such as a beginning of sequence; their name is their text.
    """

    surface: str
    cuts: tuple[int, ...]
    special: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The spans of tokens ``[first, last + 1)`` that spell ``text``, and nothing else but one space before it.

        A text that begins with a space itself must have that very space.
        """
        return self._spans([(start, start + len(text)) for start in self.occurrences(text)])

    def span(self, start: int, stop: int) -> tuple[int, int] | None:
        """The tokens that spell the characters from ``start`` to ``stop``, as :meth:`spans` has them."""
        return next(iter(self._spans([(start, stop)])), None)

    def _spans(self, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        # Tokens that spell nothing stand at one place with their neighbours: they belong to no span.
        begins = {cut: token for token, cut in enumerate(self.cuts[:-1])}
        ends = {cut: token + 1 for token, cut in reversed(list(enumerate(self.cuts[1:])))}
        found: list[tuple[int, int]] = []
        for start, stop in places:
            first = begins.get(2 * start)
            if first is None and self.surface[start] != " " and self.surface[start - 1 : start] == " ":
                first = begins.get(2 * (start - 1))
            end = ends.get(2 * stop)
            if first is not None and end is not None:
                found.append((first, end))
        return found

    def begins(self, text: str) -> int | None:
        """Where the prompt's text begins in the surface, which special tokens may stand before."""
        token = 0
        while True:
            begin = self.cuts[token] // 2
            if self.surface.startswith(text, begin):
                return begin
            if token not in self.special:
                return None
            token += 1

    def occurrences(self, text: str) -> list[int]:
        """Where ``text`` stands in the surface, whether tokens end there or not; overlapping ones each count."""
        found: list[int] = []
        start = self.surface.find(text) if text else -1
        while start >= 0:
            found.append(start)
            start = self.surface.find(text, start + 1)
        return found

    def touching(self, start: int, stop: int) -> tuple[int, int]:
        """The span of tokens ``[first, last + 1)`` that have a part in the characters from ``start`` to ``stop``."""
        tokens = [
            token
            for token in range(len(self))
            if self.cuts[token] < 2 * stop and self.cuts[token + 1] > 2 * start
        ]
        return (tokens[0], tokens[-1] + 1) if tokens else (0, 0)

    def text(self, token: int) -> str:
        """What one token spells, so that those of all tokens make up the surface: a cut character is the last one's."""
        return self.surface[self.cuts[token] // 2 : self.cuts[token + 1] // 2]

    def piece(self, token: int) -> str:
        """One token for people to read: quoted, special tokens as they are, ``…`` where it cuts a character."""
        begin, end = self.cuts[token], self.cuts[token + 1]
        text = self.surface[begin // 2 : (end + 1) // 2]
        if token in self.special:
            return text
        return "…" * (begin % 2) + f'"{printable(text)}"' + "…" * (end % 2)

    def shown(self, first: int = 0, last: int | None = None, *, most: int = 32) -> str:
        """Numbered tokens, ``[3] " of"``, from ``first`` up to ``last``; the middle is left out of a long row."""
        numbers = list(range(max(first, 0), len(self) if last is None else min(last, len(self))))
        left_out = len(numbers) - most
        parts = [f"[{token}] {self.piece(token)}" for token in numbers]
        if left_out > 0:
            parts[most // 2 : most // 2 + left_out] = [f"... {left_out} more ..."]
        lines = ["  ".join(parts[at : at + 8]) for at in range(0, len(parts), 8)]
        if any(self.cuts[token] % 2 or self.cuts[token + 1] % 2 for token in numbers):
            lines.append("(… : the token begins or ends inside a character)")
        return "\n".join("    " + line for line in lines)


def printable(text: str) -> str:
    """The text with escapes for what cannot be seen, as Python writes them: line ends, tabs, joiners."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def spell(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> Spelling:
    """Work out what ``ids`` spell; ``text`` is the prompt they were made from, if it was given as text.

    Decoding token by token is exact wherever the tokenizer loses nothing of the text. Where it does (it changes case or
    composes accents), the places come from the tokenizer's own offsets into the text, so that the user's words are
    found as the user wrote them.
    """
    names = special_names(tokenizer)
    decoded = _decoded(list(ids), decoder(tokenizer), names)
    if text is None or _spells(decoded, text):
        return decoded
    return _from_offsets(list(ids), tokenizer, text, names) or decoded


def _spells(spelling: Spelling, text: str) -> bool:
    """Is this the text, apart from special tokens that the tokenizer put before and after it?"""
    starts, stops = [0], [len(spelling)]
    while starts[-1] in spelling.special:
        starts.append(starts[-1] + 1)
    while stops[-1] - 1 in spelling.special:
        stops.append(stops[-1] - 1)
    places = [
        (spelling.cuts[start], spelling.cuts[stop]) for start in starts for stop in stops if start <= stop
    ]
    return any(spelling.surface[begin // 2 : end // 2] == text for begin, end in places)


def special_names(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that were added to the vocabulary by name: they are never cut and never joined to their neighbours."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    names = {token: str(getattr(name, "content", name)) for token, name in added.items()}
    special = getattr(tokenizer, "all_special_ids", ())
    return names | {
        token: str(tokenizer.convert_ids_to_tokens(token)) for token in special if token not in names
    }


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[int]], str]:
    # The fast ones are asked directly: a long prompt takes two calls a token, and the wrapper costs more than the work.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and hasattr(backend, "decode"):
        return lambda ids: backend.decode(ids, skip_special_tokens=False)

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def _decoded(ids: list[int], decode: Callable[[list[int]], str], names: Mapping[int, str]) -> Spelling:
    """Decode one token after the other, each behind the one before it, since decoders treat the first specially.

    Tokens that end inside a character wait for those that complete it.
    """
    surface = ""
    cuts = [0]
    anchor = start = (
        0  # ids[anchor:start] are spelt and give the next ones their left side; ids[start:] are open
    )
    for index, token in enumerate(ids):
        last = index + 1 == len(ids) or ids[index + 1] in names
        if token in names:
            surface += names[token]
            anchor = start = index + 1
        else:
            before = decode(ids[anchor:start]) if anchor < start else ""
            after = decode(ids[anchor : index + 1])
            follows = after.startswith(before)
            if (not follows or after.endswith(BROKEN)) and not last:
                whole = len(after.rstrip(BROKEN)) - len(before) if follows else 0
                cuts.append(max(cuts[-1], 2 * (len(surface) + max(whole, 0)) + 1))
                continue
            if not follows:
                # A decoder that rewrites what came before: nothing is known of the places between these tokens.
                before = ""
                after = decode(ids[start : index + 1])
            surface += after[len(before) :]
            anchor, start = start, index + 1
        cuts.append(2 * len(surface))
    special = frozenset(index for index, token in enumerate(ids) if token in names)
    return Spelling(surface, tuple(cuts), special)


def _from_offsets(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, text: str, names: Mapping[int, str]
) -> Spelling | None:
    """Places by the offsets that a fast tokenizer gives; ``None`` if it gives none for these tokens."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    encoded: Mapping[str, Any] = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    if list(encoded["input_ids"]) != ids:
        return None
    offsets: list[tuple[int, int]] = [(begin, end) for begin, end in encoded["offset_mapping"]]
    written = [
        not special for special in encoded["special_tokens_mask"]
    ]  # special tokens of the template have no place
    surface = ""
    cuts = [0]
    taken = 0  # how much of the text is in the surface
    for index, (_, end) in enumerate(offsets):
        if not written[index]:
            surface += names.get(ids[index], "")
            cuts.append(2 * len(surface))
            continue
        following = next(
            (offsets[later][0] for later in range(index + 1, len(ids)) if written[later]), len(text)
        )
        end = max(end, taken)
        shift = len(surface) - taken
        if following < end:
            # The next token has a part of the same character.
            cut = 2 * (following + shift) + 1
            end = following
        elif following == end or text[end:following] == " ":
            cut = 2 * (end + shift)
        else:
            # The text between belongs to one of the two tokens or to none; no span may begin or end there.
            cut = 2 * (end + shift) + 1
        cuts.append(max(cut, cuts[-1]))
        surface += text[taken:end]
        taken = max(end, taken)
    special = frozenset(index for index, token in enumerate(ids) if token in names or not written[index])
    return Spelling(surface + text[taken:], tuple(cuts), special)
