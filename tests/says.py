"""A directory of Transformers with a model that always says one token, as small as they come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXT = "the king and the queen went down to the sea and the ship was there"
CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPECIAL = ["<unk>", "<s>", "</s>", "<|eot|>"]


def says(directory: Path, token: str, ends: Any, *, rows: int | None = None, added: tuple[str, ...] = ()) -> Path:
    """A Llama with a context of 64. `ends` is its config's eos_token_id, `rows` its vocabulary, `added` tokens that
    its tokenizer has beyond that.
    """
    transformers = pytest.importorskip("transformers")
    backend = Backend(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator([TEXT] * 50, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    rows = rows or backend.get_vocab_size()
    backend.add_tokens(list(added))
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "chat_template": CHAT}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=ends,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        said = backend.token_to_id(token)
        model.lm_head.weight[rows - 1 if said is None else said] = 1.0
    model.save_pretrained(directory)
    return directory
