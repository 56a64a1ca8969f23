"""Encoding and decoding against the tokenizers package, on random and hostile strings and ids, for every kind of file that is
served.

The vocabularies are small and trained here. TB_TOKENIZER_STRINGS says how many strings, or lists of ids, a kind gets.
"""

import json
import os
import random
import subprocess
import unicodedata

import numpy as np
import pytest
from daemon import ROOT, find_daemon

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

N = int(os.environ.get("TB_TOKENIZER_STRINGS", "3000"))
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
MARK = "\u2581"
# What is a letter is for the Unicode version of each side's expressions to say, so characters that are newer than Unicode 14
# are left out: those that have no category here, and the ideographs from here on.
NEWER = 0x31350


def corpus():
    for folder in ("docs", "src/tokenizer", "test/e2e"):
        for name in sorted(os.listdir(os.path.join(ROOT, folder))):
            path = os.path.join(ROOT, folder, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as f:
                    yield from f
    yield from ["Größe naïve café Ünïcödé", "привет мир как дела", "你好世界 今天天气", "مرحبا بالعالم", "🎉🚀 emoji 👩‍👩‍👧"] * 40


def byte_level(split, normalizer):
    t = Tokenizer(models.BPE(ignore_merges=split is LLAMA3))
    t.normalizer = normalizer
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"),
                                               pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=2500, show_progress=False,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    t.add_special_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<wide>", normalized=False, lstrip=True, rstrip=True)])
    return t


def sentencepiece(kind, fallback=True, across=False):
    """The merges are trained on words, or across them, and then belong to a model with byte fallback."""
    base = Tokenizer(models.BPE(unk_token="<unk>"))
    base.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    if not across:
        base.pre_tokenizer = pre_tokenizers.Split(MARK, "merged_with_next")
    base.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=2500, show_progress=False, limit_alphabet=150, max_token_length=12,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256 if fallback else 0)]))
    data = json.loads(base.to_str())
    data["model"].update(byte_fallback=fallback, fuse_unk=fallback or across, unk_token="<unk>")
    t = Tokenizer.from_str(json.dumps({**data, "added_tokens": data["added_tokens"][:3], "pre_tokenizer": None}))
    end = [decoders.Strip(" ", 1, 0)]
    if kind == "gemma":
        t.normalizer, end = normalizers.Replace(" ", MARK), []
        t.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind != "llama2":
        t.normalizer = None
        t.pre_tokenizer = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme=kind, split=across or kind == "always")
    t.decoder = decoders.Sequence([decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    t.add_tokens([AddedToken("<think>", normalized=False), AddedToken("[INST]", normalized=True)])
    return t


KINDS = {
    "qwen": lambda: byte_level(QWEN, normalizers.NFC()),
    "llama3": lambda: byte_level(LLAMA3, None),
    "llama2": lambda: sentencepiece("llama2"),
    "llama2-across": lambda: sentencepiece("llama2", across=True),
    "gemma": lambda: sentencepiece("gemma"),
    "metaspace-first": lambda: sentencepiece("first"),
    "metaspace-always": lambda: sentencepiece("always"),
    "metaspace-never": lambda: sentencepiece("never", across=True),
    "unknown": lambda: sentencepiece("llama2", fallback=False),
    "unknown-fused": lambda: sentencepiece("first", fallback=False, across=True),
}

PIECES = ["<|im_start|>", "<|im_end|>", "<think>", " <wide> ", "<wide>", "<s>", "</s>", "<unk>", "[INST]", "<0x0A>", "<0x", MARK,
          MARK * 3, " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "\u3000", "\u200b", "\u180e", "\x00", "\x1f", "'s", "'LL",
          "e\u0301", "e\u07fd\u031b", "\u0f7a\u0d3c", "\U00011935\U00011930", "\u1100\u1161\u11a8", "\u0344", "\u0958", "\ufb01", "\ufeff", "\U0001f469\u200d\U0001f467", "\U0010ffff",
          "the", "return", "你好", "привет", "مرحبا", "1234567", "٣٤", "Ⅷ", "½", "...", "!!", "{}", "a" * 70, "ſ", "K"]


def strings(seed, lines):
    """Seeded; every one is valid text. Half are lines of prose and code that were cut and joined, half are hostile."""
    rng = random.Random(seed)
    for _ in range(N):
        parts = []
        for _ in range(rng.choice([0, 1, 1, 2, 4, 8, 30])):
            how = rng.randrange(5)
            if how == 0:
                line = rng.choice(lines)
                parts.append(line[rng.randrange(len(line) + 1):])
            elif how == 1:
                parts.append(rng.choice(PIECES))
            elif how == 2:
                parts.append("".join(chr(rng.randrange(32, 127)) for _ in range(rng.randrange(12))))
            elif how == 3:
                top = rng.choice([0x80, 0x800, 0x3100, 0xD800, NEWER])
                text = (chr(rng.randrange(top)) for _ in range(rng.randrange(6)))
                parts.append("".join(c for c in text if unicodedata.category(c) not in ("Cn", "Cs")))
            else:
                parts.append(rng.choice(" \n\t.a1'") * rng.randrange(9))
        yield "".join(parts)


def program():
    return os.path.join(os.path.dirname(find_daemon()), "..", "..", "test", "unit", "tokenizer", "tokenize")


@pytest.mark.parametrize("kind", KINDS)
def test_same_ids(kind, tmp_path):
    if not os.path.exists(program()):
        pytest.skip("a build without tests")
    theirs = KINDS[kind]()
    path = str(tmp_path / "tokenizer.json")
    theirs.save(path)
    texts = list(strings(kind, list(corpus())))
    raw = [t.encode() for t in texts]
    done = subprocess.run([program(), path], input=b"".join(len(t).to_bytes(4, "little") + t for t in raw), check=True,
                          capture_output=True)
    got, at = np.frombuffer(done.stdout, np.int32), 0
    for text, want in zip(texts, theirs.encode_batch(texts, add_special_tokens=False)):
        ids = got[at + 1:at + 1 + got[at]].tolist()
        assert ids == want.ids, (text, [theirs.id_to_token(i) for i in ids], want.tokens)
        at += 1 + len(ids)
    assert at == len(got)


def spoil(rng, raw):
    """Bytes of text as they are, or with some lost, changed or put between."""
    raw = bytearray(raw)
    for _ in range(rng.choice([0, 0, 1, 1, 3])):
        at = rng.randrange(len(raw) + 1)
        raw[at:at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
    return bytes(raw)


def lists_of_ids(rng, theirs, lines):
    """What texts become; ids at random, those that do not exist too; runs of bytes, spoilt, with special tokens in between."""
    size = theirs.get_vocab_size(with_added_tokens=True)
    spelt = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    spelt.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in spelt)})
    byte = [theirs.token_to_id(f"<0x{b:02X}>") or theirs.token_to_id(spelt[b]) for b in range(256)]
    tokens = theirs.get_added_tokens_decoder()
    added = [i for i in tokens if not tokens[i].normalized]
    marks = [i for i in (theirs.token_to_id(MARK * n) for n in (1, 2, 3)) if i is not None] or [0]
    for _ in range(N):
        ids = []
        for _ in range(rng.choice([0, 1, 1, 2, 4, 8, 20])):
            how = rng.randrange(6)
            if how == 0:
                line = rng.choice(lines)
                ids += theirs.encode(line[rng.randrange(len(line) + 1):], add_special_tokens=False).ids
            elif how == 1:
                ids += [rng.randrange(size + 3) for _ in range(rng.randrange(6))]
            elif how == 2:
                ids.append(rng.choice(added))
            elif how == 3:
                ids.append(rng.choice(marks))
            else:
                text = rng.choice(["é", "你好", "🎉", " ", "a", "\u0344", MARK, "👩\u200d👧"]) * rng.randrange(1, 3)
                ids += [byte[b] for b in spoil(rng, text.encode()) if byte[b] is not None]
        # the library gives an added token with normalized: true the normalizer's mark, and shows it as if it were not special
        yield [i for i in ids if i not in tokens or not tokens[i].normalized]


@pytest.mark.parametrize("kind", KINDS)
def test_same_text(kind, tmp_path):
    if not os.path.exists(program()):
        pytest.skip("a build without tests")
    theirs = KINDS[kind]()
    theirs.add_special_tokens([AddedToken("<0x41>x", normalized=False), AddedToken(f"a{MARK}b", normalized=False)])
    path = str(tmp_path / "tokenizer.json")
    theirs.save(path)
    rng = random.Random(kind)
    lists = list(lists_of_ids(rng, theirs, list(corpus())))
    visible = [rng.random() < 0.5 for _ in lists]
    done = subprocess.run([program(), "-d", path], check=True, capture_output=True, input=b"".join(
        np.array([skip, len(ids), *ids], np.int32).tobytes() for ids, skip in zip(lists, visible)))
    at = 0
    for ids, skip in zip(lists, visible):
        n = int.from_bytes(done.stdout[at:at + 4], "little")
        got = done.stdout[at + 4:at + 4 + n].decode()
        assert got == theirs.decode(ids, skip_special_tokens=skip), ([theirs.id_to_token(i) for i in ids], skip)
        at += 4 + n
    assert at == len(done.stdout)
