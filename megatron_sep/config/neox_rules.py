"""What may become of a key of GPT-NeoX or SepLLM, and what it means where a file leaves it out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sep.errors import UserError

Tree = dict[str, Any]
NEEDED = object()
"""The default of a key that GPT-NeoX has none for: it does not train without."""


class NeoxError(UserError):
    """Keys of a GPT-NeoX file that cannot be taken over; one a line."""


class ArchitectureError(NeoxError):
    """A model that is no decoder of attention and MLP layers: nothing else of its file matters."""


@dataclass(frozen=True)
class To:
    """Becomes ``path`` of our configuration."""

    path: str
    convert: Callable[[Any], Any] = lambda value: value
    default: Any = None


@dataclass(frozen=True)
class Part:
    """Means something together with other keys, put together in ``neox_parts``."""

    of: str
    default: Any = None
    inside: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the keys inside this one, which is a mapping."""


@dataclass(frozen=True)
class Ignored:
    reason: str
    default: None = None


@dataclass(frozen=True)
class Only:
    """Taken where it has one of these values; refused with the reason otherwise."""

    values: tuple[Any, ...]
    reason: str
    default: Any = None
    error: type[NeoxError] = NeoxError
    of: str = ""
    """What it goes into, where one of these values is not the only one."""


@dataclass(frozen=True)
class Refused:
    reason: str
    default: None = None


SHAPE = ("num_layers", "hidden_size", "num_attention_heads")
"""Where one of these stands, a file describes a model, and GPT-NeoX's defaults are meant."""


def describes_a_model(values: Mapping[str, Any]) -> bool:
    """Whether files are a run's and not a setup or a pattern that lies beside others."""
    return any(key in values for key in SHAPE)


Rule = To | Part | Ignored | Only | Refused


def choose(key: str, choices: Mapping[str, Any]) -> Callable[[Any], Any]:
    """A value through a table; one that is not there is refused."""

    def convert(value: Any) -> Any:
        if value not in choices:
            raise NeoxError(f"{key}={value!r}: known are {', '.join(map(repr, choices))}")
        return choices[value]

    return convert
