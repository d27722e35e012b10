"""A window that shrinks in training: from full attention to a few neighbours without one large jump of the loss."""

from dataclasses import dataclass, replace

from megatron_sep.attention.pattern import AttentionPattern
from megatron_sep.attention.rules import LayerRules
from megatron_sep.config.schema import AnnealingConfig


@dataclass(frozen=True)
class Annealing:
    """The rules of each step. The window halves at even distances, so that compiled layers see a handful of values."""

    final: LayerRules
    config: AnnealingConfig | None
    first_step: int
    """Steps before the run's first one."""

    def __call__(self, step: int) -> LayerRules:
        """For step ``first_step + 1`` and on."""
        window = self.window(step)
        return self.final if window is None else _with_window(self.final, window)

    def window(self, step: int) -> int | None:
        """Tokens of the window while it still shrinks; None: it is that of the rules."""
        done = step - self.first_step - 1
        final = self._final_window()
        if self.config is None or final is None or done >= self.config.steps:
            return None
        windows = self.config.windows(final)
        return windows[done * len(windows) // self.config.steps]

    def stages(self) -> dict[int, int]:
        """Each window by the first step that has it, the last one included; empty where nothing shrinks."""
        final = self._final_window()
        if self.config is None or final is None:
            return {}
        steps = range(self.first_step + 1, self.first_step + self.config.steps + 1)
        found: dict[int, int] = {}
        for step in steps:
            window = self.window(step)
            if window is not None and window not in found.values():
                found[step] = window
        return found | {steps.stop: final}

    def _final_window(self) -> int | None:
        return next((pattern.window for pattern in self.final.patterns if pattern.window is not None), None)


def _with_window(rules: LayerRules, window: int) -> LayerRules:
    def wider(pattern: AttentionPattern) -> AttentionPattern:
        return pattern if pattern.window is None else replace(pattern, window=window)

    return replace(rules, patterns=tuple(wider(pattern) for pattern in rules.patterns))
