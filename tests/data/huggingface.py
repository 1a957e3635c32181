"""Small tokenizer.json directories of the kinds that public models have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant.\nThe dog's leash isn't here?",
    "USER: What's in the picture? ASSISTANT: 2 dogs, 13 cats and one horse running over the green grass.",
    "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhy? [/INST] Because it rains. <|user|>\nHello there.",
    " <|User|>:Describe the image in detail.\n <|Bot|>:The image shows a red house; it is 45 metres tall.",
    "Ümläute und 日本語 text, déjà vu…  two  spaces\t\ttabs\n\n\nnew lines",
]
LLAMA_CONTROLS = ["<unk>", "<s>", "</s>"]
QWEN_CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def trained(tokenizer: Tokenizer, size: int, **options: Any) -> dict[str, Any]:
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return json.loads(tokenizer.to_str())


def llama(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """LLaMA's BPE with byte fallback. kind: "first" (legacy=False), "always" (legacy), or "prepend": a
    normalizer writes the word-start marker, as in Zephyr's file."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    contents = trained(raw, 500)
    fixed = LLAMA_CONTROLS + [f"<0x{byte:02X}>" for byte in range(256)]
    learnt = sorted(contents["model"]["vocab"], key=contents["model"]["vocab"].get)
    contents["model"] |= {
        "vocab": {piece: i for i, piece in enumerate([*fixed, *learnt])},
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    if kind == "prepend":
        tokenizer.pre_tokenizer = None  # type: ignore[assignment]
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in LLAMA_CONTROLS])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), LLAMA_CONTROLS, strict=True))
    return json.loads(tokenizer.to_str()), names


def byte_level(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Byte-level BPE. kind: "gpt2" (one control token for everything) or "qwen" (no <s>, NFC)."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trained(tokenizer, 500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    controls = QWEN_CONTROLS if kind == "qwen" else QWEN_CONTROLS[:1]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in controls])
    if kind == "gpt2":
        names: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "unk_token"), QWEN_CONTROLS[0])
    else:
        names = {"bos_token": None, "eos_token": QWEN_CONTROLS[2], "pad_token": QWEN_CONTROLS[0]}
    return json.loads(tokenizer.to_str()), names


KINDS = ("first", "always", "prepend", "gpt2", "qwen")


def write(kind: str, out: Path) -> Path:
    """The directory of one kind, as a model repository has it."""
    contents, names = llama(kind) if kind in ("first", "always", "prepend") else byte_level(kind)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(contents, ensure_ascii=False), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out
