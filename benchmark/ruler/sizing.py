"""How large a sample may be: the number of haystack units that fills a length without exceeding it.

"bisect" is upstream's rule since June 2025: the largest number whose random sample fits, between `step` units and what
the first sample's tokens per unit promise. "step" is the older rule, RetroInfer's too: the number grows by `step` until
a sample overflows, answers counted, then one step back; lengths are multiples of `step` and short contexts under-fill.
"""

from __future__ import annotations

from .generator import Example, Generator, Setting

SIZINGS = ("bisect", "step")
_SMALLER_STEPS = 10
_SEVERAL, _MOST_QUESTIONS = 20, 500


def largest_units(generator: Generator) -> int:
    """Units by the generator's own `sizing`. Raises ValueError where not even its `minimum` fits."""
    return _by_steps(generator) if generator.sizing == "step" else _by_bisection(generator)


def fitting_example(generator: Generator, units: int, index: int) -> tuple[Example, int]:
    """A random sample of at most `units` that fits, and its tokens, the answer to come included.

    One that is too long is drawn again with a step less, or with a tenth of a step less where that would leave less
    than one (upstream leaves even one word, or tries for ever). Raises ValueError where not even `minimum` fits.
    """
    while True:
        example = generator.example(units, index)
        tokens = generator.tokens(example.prompt)
        if tokens <= generator.setting.length:
            return example, tokens
        if units <= generator.minimum:
            raise too_short(generator.setting, _smallest(generator))
        less = generator.step if units >= 2 * generator.step else max(1, generator.step // _SMALLER_STEPS)
        units = max(units - less, generator.minimum)


def too_short(setting: Setting, needed: int) -> ValueError:
    """The error for a length that leaves no room for a sample of `needed` tokens."""
    return ValueError(
        f"context_len: got {setting.length}, allowed for {setting.spec.name} with this tokenizer and template: "
        f"at least about {needed}"
    )


def _smallest(generator: Generator) -> int:
    """Tokens that suffice for the smallest samples: the most of several."""
    several = range(min(generator.samples or _SEVERAL, _MOST_QUESTIONS))
    return max(generator.tokens(generator.example(generator.minimum, index).prompt) for index in several)


def _by_bisection(generator: Generator) -> int:
    per_unit = generator.setting.count(generator.draft(generator.probe_units).prompt) / generator.probe_units
    high = max(generator.most_units(per_unit), 2 * generator.step)
    if generator.limit is not None:
        high = min(high, generator.limit)
    found = _largest_fitting(generator, generator.step, high)
    if found is None:
        found = _largest_fitting(generator, generator.minimum, generator.step - 1)
    return generator.minimum if found is None else found


def _largest_fitting(generator: Generator, low: int, high: int) -> int | None:
    found = None
    while low <= high:
        middle = (low + high) // 2
        if _fits(generator, middle):
            found, low = middle, middle + 1
        else:
            high = middle - 1
    return found


def _fits(generator: Generator, units: int, with_answer: bool = False) -> bool:
    draft = generator.draft(units)
    text = draft.prompt + (" ".join(draft.outputs) if with_answer else "")
    return generator.tokens(text) + generator.extra_tokens <= generator.setting.length


def _by_steps(generator: Generator) -> int:
    units, fitting = generator.start, None
    while (generator.limit is None or units <= generator.limit) and _fits(generator, units, generator.counts_answers):
        fitting, units = units, units + generator.step
    if fitting is None:
        fitting = _largest_fitting(generator, generator.minimum, units - 1)
    return generator.minimum if fitting is None else fitting
