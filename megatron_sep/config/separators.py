"""How a configuration names separators: as texts, with what a tokenizer merged them into, or as a list of ids."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from megatron_sep.config.section import Section

ListName = Literal["llama-3-training-free", "llama-3-streaming", "gpt-neox-streaming"]
"""Lists of token ids of the authors' code, each for one tokenizer."""


def _kind_of_texts(value: Any) -> str:
    return "<name>" if isinstance(value, str) else "<texts>"


def _kind_of_separators(value: Any) -> str:
    return "<mapping>" if isinstance(value, dict | SeparatorsConfig) else _kind_of_texts(value)


# The kinds are told apart by their type, so that a mistake is one of a single kind.
Texts = Annotated[tuple[str, ...], Tag("<texts>")]
DefaultOrTexts = Annotated[Annotated[Literal["default"], Tag("<name>")] | Texts, Discriminator(_kind_of_texts)]


class SeparatorsConfig(Section):
    """Texts, and what the tokenizer merged them into."""

    texts: DefaultOrTexts
    """As `separators` has them on their own."""
    merged: bool = False
    """Also tokens of separators, quotes and brackets alone that hold one of the texts: ` .`, `,"`, newline runs."""


Separators = Annotated[
    Annotated[Literal["default", ListName], Tag("<name>")] | Texts | Annotated[SeparatorsConfig, Tag("<mapping>")],
    Discriminator(_kind_of_separators),
]
