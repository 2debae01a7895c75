"""The task: GSM-Symbolic problems with a chain of thought, whose last line is `#### NUMBER`.

A record of the problems' file (JSON lines, perhaps compressed by gzip) has the fields

    template   the number of the GSM-Symbolic template
    split      "train", "distill", "test" or "new_template" (see `problems.py`)
    prompt     the question
    response   a right chain of thought
    answer     its last number

Tokens are words with the space before them, single digits, and single other characters, so that the
text of a list of tokens is their concatenation.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from dmax_kernels.evaluation.grading import same_answer
from dmax_kernels.files import check_input
from dmax_kernels.gsm.wording import plain
from dmax_kernels.ring_walk.model import TinyDlmConfig, TinyDlmForCausalLM

if TYPE_CHECKING:
    from dmax_kernels.evaluation.cells import Response

SPLITS = ("train", "distill", "test", "new_template")
FIELDS = ("template", "split", "prompt", "response", "answer")

BLOCK = 32
PROMPT_TOKENS = 4 * BLOCK  # the longest question
RESPONSE_TOKENS = 5 * BLOCK  # the longest chain of thought, with <eos>
MAX_NEW_TOKENS = RESPONSE_TOKENS + BLOCK

PAD, MASK, EOS, UNK = "<pad>", "<mask>", "<eos>", "<unk>"
SPECIAL = (PAD, MASK, EOS, UNK)
PAD_ID, MASK_ID, EOS_ID, UNK_ID = range(len(SPECIAL))

# A word, a run of "#", a digit or another character, each with the space before it, or white space
TOKEN = r" ?[A-Za-z]+(?:'[a-z]+)?| ?#+| ?\d| ?[^\sA-Za-z\d]|\s"
FINAL = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


def read_problems(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of each split, in the file's order.

    Raises:
        ValueError: there is no such file, or a line is no such record.
    """
    check_input("--data", path)
    splits: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                splits[record["split"]].append({name: record[name] for name in FIELDS})
            except (ValueError, TypeError, KeyError) as error:
                need = f"hold records with {', '.join(FIELDS)}"
                raise ValueError(
                    f"--data {path}:{number} must {need}, got {type(error).__name__}: {error}"
                ) from None
    return splits


def words_of(texts: Iterable[str]) -> list[str]:
    """The vocabulary of these texts, the most frequent words first."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(re.findall(TOKEN, text))
    return [*SPECIAL, *(word for word, _ in sorted(counts.items(), key=lambda c: (-c[1], c[0])))]


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNK))
    tokenizer.pre_tokenizer = Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        mask_token=MASK,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary: int, block_length: int = BLOCK, **sizes: int) -> TinyDlmForCausalLM:
    """A new model, initialised from torch's global generator; `sizes` are of its configuration."""
    return TinyDlmForCausalLM(
        TinyDlmConfig(
            vocab_size=vocabulary,
            max_position_embeddings=512,
            block_length=block_length,
            mask_token_id=MASK_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
            **sizes,
        )
    )


@dataclass(frozen=True)
class Words:
    """A vocabulary. On whole files, its `encode` takes a sixth of the tokenizer's time."""

    id_of: dict[str, int]

    @classmethod
    def of(cls, words: list[str]) -> Words:
        return cls({word: i for i, word in enumerate(words)})

    def encode(self, text: str) -> list[int]:
        return [self.id_of.get(word, UNK_ID) for word in re.findall(TOKEN, text)]

    def prompt(self, record: dict[str, Any]) -> list[int]:
        """The question's token ids, padded on the left to whole blocks."""
        ids = self.encode(record["prompt"])
        return [PAD_ID] * (-len(ids) % BLOCK) + ids

    def response(self, record: dict[str, Any]) -> list[int]:
        return [*self.encode(record["response"]), EOS_ID]


def final_number(text: str) -> str | None:
    """The number after the last `####`."""
    found = FINAL.findall(text)
    return found[-1] if found else None


def grade(response: Response, record: dict[str, Any]) -> dict[str, bool]:
    """`answer`: the final number is right. `strict`: the text is the template's, however worded."""
    found = final_number(response.text)
    return {
        "answer": found is not None and same_answer(found, record["answer"]),
        "strict": response.complete and plain(response.text) == plain(record["response"]),
    }
