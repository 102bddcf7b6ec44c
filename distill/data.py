"""Batches of tokens from a mixture of sources, in an order that a seed fixes and a checkpoint can continue.

A row comes from one source: the one that is furthest behind its share of the tokens so far. Each source goes through
its documents in an order that depends on (seed, source, epoch) and starts again when it is through, without dropping
the rest of an epoch. The position is a few integers a source, so restoring it costs nothing and is exact.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linearize.console import note
from linearize.distill import processes
from linearize.distill.encoding import Encoded, encode
from linearize.distill.options import DataOptions, Source
from linearize.distill.sources import Documents, FixedDocuments, Part, open_documents
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["SHORTEST_DOCUMENT", "Batch", "TokenStream", "build_stream", "model_inputs"]

Batch = dict[str, torch.Tensor]
"""`input_ids` (B, T) int64, and as far as a batch needs them, all (B, T) int64:

attention_mask: 1 on real tokens, where some token is padding.
position_ids: 0 at every document's first token and up by 1 from there, where some row has several documents. A row
    that goes on with a document of the row before begins at 0 too.
loss_mask: 1 on tokens that count as targets of end-to-end losses, where some real token does not (a chat's questions).

A stream never gives attention_mask and position_ids together; `linearize.distill.positions` does, for rows of one
document with gaps in their positions. `model_inputs` leaves out what is not for the model.
"""

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")

# A document of one token has nothing to predict.
SHORTEST_DOCUMENT = 2


def model_inputs(batch: Batch) -> Batch:
    """What of a batch a model reads."""
    return {name: batch[name] for name in _MODEL_INPUTS if name in batch}


def build_stream(
    options: DataOptions,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    part: Part = "train",
    teacher: "PreTrainedModel | None" = None,
    cache_dir: str | Path | None = None,
    shortest: int = SHORTEST_DOCUMENT,
) -> "TokenStream":
    """Open the data sources and return their stream of batches.

    Args:
        options: sources, shapes and split.
        tokenizer: the model's.
        seed: of the order, and of the texts that the teacher writes.
        part: `"train"`, or `"held_out"` for what is never in the train part. Generated texts are train only: text
            from the teacher's own mouth says little about the world's.
        teacher: the original model; needed if a source is `generated`.
        cache_dir: where generated texts are kept.
        shortest: documents of fewer tokens are passed over where rows are documents, and a source that has no other
            is left out with a note: training on long rows teaches nothing with short ones.

    Raises:
        LinearizeError: files that are missing or unreadable, or too little text for one row.
    """
    sources, opened = [], []
    for source in options.sources:
        if source.kind != "generated":
            # Where a long document makes several rows, passages may be long.
            form = options.packing if shortest <= SHORTEST_DOCUMENT else "packed"
            documents = open_documents(source, part, options.held_out, options.seq_len, form)
        elif part == "train":
            documents = _generated(source, options, tokenizer, seed, teacher, cache_dir)
        else:
            continue
        sources.append(source)
        opened.append(documents)
    stream = TokenStream(options, sources, opened, tokenizer, seed, part, shortest)
    stream.check()
    return stream


class TokenStream(Iterator[Batch]):
    """Endless batches, on the CPU. `build_stream` makes one.

    `state_dict` is small and JSON-able; after `load_state_dict` of it the same batches follow, to the token.
    """

    def __init__(
        self,
        options: DataOptions,
        sources: Sequence[Source],
        documents: Sequence[Documents],
        tokenizer: "PreTrainedTokenizerBase",
        seed: int,
        part: Part,
        shortest: int = SHORTEST_DOCUMENT,
    ) -> None:
        self._options = options
        self.seq_len = options.seq_len
        self._part = part
        self._shortest = SHORTEST_DOCUMENT if options.packing == "packed" else max(shortest, SHORTEST_DOCUMENT)
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if eos is None and options.packing == "packed":
            raise LinearizeError(
                "tokenizer: it has no end-of-text token to put between documents; set tokenizer.eos_token, or use "
                "packing: document"
            )
        self._padding = pad if pad is not None else (eos or 0)
        self._readers = [
            _Reader(source, docs, f"{seed} {index}", tokenizer, self._shortest)
            for index, (source, docs) in enumerate(zip(sources, documents))
        ]
        told = [
            [options.seq_len, options.batch_size, options.packing, seed, part, len(tokenizer)],
            [[source.kind, source.weight, docs.signature] for source, docs in zip(sources, documents)],
            *([self._shortest] if self._shortest > SHORTEST_DOCUMENT else []),
        ]
        self._fingerprint = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]

    def __next__(self) -> Batch:
        rows = [self._row() for _ in range(self._options.batch_size)]
        length = max(len(row.ids) for row in rows)  # short documents are not padded to seq_len
        column = torch.arange(length)
        missing = [length - len(row.ids) for row in rows]
        batch = {"input_ids": torch.tensor([row.ids + [self._padding] * some for row, some in zip(rows, missing)])}
        if any(missing):
            batch["attention_mask"] = (column < length - torch.tensor(missing)[:, None]).long()
        if any(len(row.begins) > 1 for row in rows):
            begins = torch.zeros(len(rows), length, dtype=torch.int64)
            for index, row in enumerate(rows):
                begins[index, row.begins] = torch.tensor(row.begins)
            batch["position_ids"] = column - begins.cummax(1).values
        if not all(all(row.counted) for row in rows):
            counted = [[*map(int, row.counted), *[0] * some] for row, some in zip(rows, missing)]
            batch["loss_mask"] = torch.tensor(counted)
        return batch

    def skip(self, batches: int) -> None:
        """Go on as if that many batches had been drawn; no tensor is built.

        The stream is the same in every process of a run: process r of n skips r batches, draws one, skips n - 1 - r,
        and all have the same position, which does not depend on n.
        """
        for _ in range(batches * self._options.batch_size):
            self._row()

    def state_dict(self) -> dict[str, Any]:
        """The position: for each source its epoch, document, offset in it, and tokens drawn so far."""
        return {"data": self._fingerprint, "positions": [reader.position() for reader in self._readers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            LinearizeError: the state belongs to other data, another seed or other shapes.
        """
        if state.get("data") != self._fingerprint:
            raise LinearizeError(
                f"data: the checkpoint's position belongs to data {state.get('data')!r}, this is {self._fingerprint!r} "
                "(files, sources, seed, seq_len, batch_size or tokenizer differ); restore them, or start a new run"
            )
        for reader, position in zip(self._readers, state["positions"]):
            reader.seek(position)

    def tokens(self, limit: int | None = None) -> torch.Tensor:
        """The documents of this part once each, in their own order, joined by the end-of-text token.

        Args:
            limit: the most tokens that are returned; with several sources each gives its share by weight.

        Returns:
            (N,) int64, N <= limit. The stream's position stays where it is.
        """
        ids: list[int] = []
        drawn = [0] * len(self._readers)
        walks = [reader.once() for reader in self._readers]
        live = set(range(len(walks)))
        while live and (limit is None or len(ids) < limit):
            index = min(live, key=lambda i: (drawn[i] / self._readers[i].weight, i))
            document = next(walks[index], None)
            if document is None:
                live.remove(index)
            else:
                drawn[index] += len(document.ids)
                ids += document.ids
        return torch.tensor(ids[:limit])

    def check(self) -> None:
        """Raise a LinearizeError where there is too little text."""
        if self._part == "held_out":
            if not any(next(reader.once(), None) for reader in self._readers):
                raise LinearizeError(
                    f"data.held_out: {self._options.held_out} leaves no text to evaluate on; raise it, give more text, "
                    "or name a file with evaluate.text"
                )
            # A source too small to have a held-out part is not drawn from.
            self._readers = [reader for reader in self._readers if next(reader.once(), None)]
            return
        needed = self._options.seq_len if self._options.packing == "packed" else self._shortest
        short = []
        for reader in self._readers:
            found, counted = 0, False
            for document in reader.once():
                found += len(document.ids)
                counted = counted or document.counted is None or any(document.counted)
                if found >= needed and counted:
                    break
            else:
                if self._shortest > SHORTEST_DOCUMENT:
                    short.append(reader)
                    continue
                if found >= needed:
                    raise LinearizeError(
                        f"data source {reader.name}: none of its chats has an answer, a message of role 'assistant' "
                        "that is not empty; give chats that have, or set the source's loss to all"
                    )
                raise LinearizeError(
                    f"data source {reader.name}: its train part has {found} tokens, one row needs {needed}; "
                    f"give more text, or lower data.seq_len or data.held_out ({self._options.held_out})"
                )
        if len(short) == len(self._readers):
            raise LinearizeError(
                f"data: no document of {', '.join(reader.name for reader in short)} has {self._shortest} tokens and "
                f"something to learn, as rows of up to {self._options.seq_len} ask for; give longer documents, lower "
                "data.seq_len, or leave the stage out"
            )
        for reader in short:
            self._readers.remove(reader)
            if processes.rank() == 0:
                note(
                    f"data source {reader.name}: none of its documents has {self._shortest} tokens and something to "
                    f"learn; not drawn from for rows of up to {self._options.seq_len}"
                )

    def _row(self) -> "_Row":
        reader = min(self._readers, key=lambda reader: reader.drawn / reader.weight)
        if self._options.packing == "packed":
            return reader.take(self._options.seq_len)
        return reader.take_document(self._options.seq_len)


@dataclass
class _Row:
    """Tokens, whether each counts as a target, and the columns where documents begin, column 0 among them."""

    ids: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)

    def add(self, document: Encoded, start: int, stop: int) -> None:
        """Append a part of a document."""
        piece = document.ids[start:stop]
        self.begins.append(len(self.ids))
        self.ids += piece
        self.counted += [True] * len(piece) if document.counted is None else document.counted[start:stop]


class _Reader:
    """One source's documents in shuffled order, epoch after epoch."""

    def __init__(
        self, source: Source, documents: Documents, seed: str, tokenizer: "PreTrainedTokenizerBase", shortest: int
    ) -> None:
        self.name = source.kind if source.path is None else f"{source.kind} {source.path}"
        self.weight = source.weight
        self.drawn = 0
        self._documents = documents
        self._seed = seed
        self._tokenizer = tokenizer
        self._loss = source.loss
        self._shortest = shortest
        self.seek((0, 0, 0, 0))

    def position(self) -> list[int]:
        return [self._epoch, self._document, self._offset, self.drawn]

    def seek(self, position: Sequence[int]) -> None:
        self._epoch, self._document, self._offset, self.drawn = position
        self._order = self._shuffled()
        self._current: Encoded | None = None

    def take(self, count: int) -> _Row:
        """The next `count` tokens, across documents and epochs."""
        row = _Row()
        while len(row.ids) < count:
            document = self._load()
            start = self._offset
            self._offset = min(start + count - len(row.ids), len(document.ids))
            if self._offset > start:
                row.add(document, start, self._offset)
            if self._offset == len(document.ids):
                self._advance()
        self.drawn += count
        return row

    def take_document(self, most: int) -> _Row:
        """The next document, or the next `most` tokens of a longer one; what is too short for a row is passed over."""
        while len((document := self._load()).ids) - self._offset < self._shortest:
            self._advance()
        start, self._offset = self._offset, min(self._offset + most, len(document.ids))
        row = _Row()
        row.add(document, start, self._offset)
        if self._offset == len(document.ids):
            self._advance()
        self.drawn += len(row.ids)
        return row

    def once(self) -> Iterator[Encoded]:
        """Every document that is long enough for a row, in the source's own order."""
        for index in range(len(self._documents)):
            document = self._encoded(index)
            if len(document.ids) >= self._shortest:
                yield document

    def _load(self) -> Encoded:
        if self._current is None:
            self._current = self._encoded(int(self._order[self._document]))
        return self._current

    def _encoded(self, index: int) -> Encoded:
        content = self._documents.get(index)
        return Encoded([]) if content is None else encode(self._tokenizer, content, self._loss)

    def _advance(self) -> None:
        self._current = None
        self._offset = 0
        self._document += 1
        if self._document == len(self._documents):
            self._document = 0
            self._epoch += 1
            self._order = self._shuffled()

    def _shuffled(self) -> torch.Tensor:
        digest = hashlib.sha256(f"{self._seed} {self._epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randperm(len(self._documents), generator=generator)


def _generated(
    source: Source,
    options: DataOptions,
    tokenizer: "PreTrainedTokenizerBase",
    seed: int,
    teacher: "PreTrainedModel | None",
    cache_dir: str | Path | None,
) -> Documents:
    from linearize.distill.generated import write_texts

    if teacher is None:
        raise LinearizeError("data source generated: no teacher to write the texts; pass build_stream a teacher")
    assert source.tokens is not None
    texts = write_texts(teacher, tokenizer, source.tokens, options.seq_len, seed, source.prompt, cache_dir)
    return FixedDocuments(texts)
