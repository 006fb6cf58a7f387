"""The settings of the judge of captions, `quality.judge.*`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeSettings:
    """A model behind an OpenAI-compatible endpoint, and how much it may be asked."""

    url: str  # base URL, up to and without /chat/completions
    model: str
    key_variable: str = "JUDGE_API_KEY"  # environment variable with the key; unset: no key is sent
    pairs: int = 100  # pairs of captions to ask about, each in both orders
    concurrency: int = 8
    timeout: float = 60.0  # seconds of one request
    seconds: float = 600.0  # of the whole judgement; what is open then is not judged
    usd_per_million_input: float | None = None
    usd_per_million_output: float | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 64})  # of each request


def read_judge(settings: Mapping[str, Any]) -> JudgeSettings | None:
    """The judge of `quality.judge`; None if it is empty.

    Raises:
        UserError: if a setting is unknown, missing or of a wrong type or size.
    """
    if not settings:
        return None
    known = [each.name for each in fields(JudgeSettings)]
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"quality.judge must hold {', '.join(known)}; got {name}")
        wanted, fits = _expected(name, value)
        if not fits:
            raise UserError(f"quality.judge.{name} must be {wanted}, got {value!r}")
    if missing := [name for name in ("url", "model") if not settings.get(name)]:
        raise UserError(f"quality.judge.{missing[0]} must be set")
    return JudgeSettings(**settings)


def _expected(name: str, value: Any) -> tuple[str, bool]:
    """What a setting must be, and whether the value is that."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "url":
        return "an http(s) URL", isinstance(value, str) and value.startswith(("http://", "https://"))
    if name in ("model", "key_variable"):
        return "text", isinstance(value, str)
    if name in ("pairs", "concurrency"):
        return "an integer of at least 1", isinstance(value, int) and is_number and value >= 1
    if name in ("timeout", "seconds"):
        return "a number above 0", is_number and value > 0
    if name == "options":
        return "a mapping", isinstance(value, Mapping)
    return "a number of at least 0, or null", value is None or (is_number and value >= 0)
