"""The separator lists of the authors' code (https://github.com/HKUDS/SepLLM), each id with its text in its tokenizer.

Ids mean nothing to another tokenizer: whoever takes a list compares the texts first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_sep.config.separators import ListName


@dataclass(frozen=True)
class SeparatorList:
    tokenizer: str
    """Whose it is."""
    texts: Mapping[int, str]


_LLAMA_3 = {13: ".", 11: ",", 30: "?", 0: "!", 26: ";", 25: ":", 198: "\n", 220: " "}
_LLAMA_3_MERGED = {
    662: " .", 1174: " ,", 949: " ?", 758: " !", 2652: " ;", 551: " :", 720: " \n", 256: "  ", 262: "   ",
}  # fmt: skip
_GPT_NEOX = {15: ".", 13: ",", 32: "?", 2: "!", 28: ";", 27: ":", 209: " ", 186: "\t", 187: "\n"}
_GPT_NEOX_MERGED = {
    964: " .", 1157: " ,", 3736: " ?", 2195: " !", 3706: " ;", 1163: " :", 2490: " \n", 50276: "  ", 586: "\n ",
    4928: " \n ", 50275: "   ",
}  # fmt: skip

LISTS: Mapping[ListName, SeparatorList] = {
    # its last id begins texts; the paper has the tab there, which is 197
    "llama-3-training-free": SeparatorList("Llama-3", {**_LLAMA_3, 128000: "<|begin_of_text|>"}),
    "llama-3-streaming": SeparatorList("Llama-3", {**_LLAMA_3, **_LLAMA_3_MERGED}),
    "gpt-neox-streaming": SeparatorList("GPT-NeoX", {**_GPT_NEOX, **_GPT_NEOX_MERGED}),
}
