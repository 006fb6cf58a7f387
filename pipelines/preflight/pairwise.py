"""Asks a model which of two captions describes an image better: a judge for corpora without references or objects.

    asked        every pair twice, with the captions in both orders, so that a liking for the first place cancels out
    score        of a pair: the mean of the two answers, 1 if ours is better, 1/2 for a tie, 0 if theirs is
    preference   mean score of the judged pairs, with a 95 % interval (bootstrap over images)

The judge is any endpoint that speaks OpenAI's chat completions. It never stops a run: a pair whose answers do not come,
or say nothing, is not judged, and is counted with the reason. A judge that leaves WRITTEN_OFF questions open before its
first answer is not asked any more. A request takes at most `timeout` seconds and all of them `seconds`; a judge that
asks to wait (429, or 5xx) is asked again within that time. What it counts of its tokens, and their price, is added up.
"""

import asyncio
import json
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from pipelines.config.judge import JudgeSettings
from pipelines.metrics.bootstrap import bootstrap
from pipelines.text import clean

logger = logging.getLogger(__name__)

WRITTEN_OFF = 8  # questions without an answer, and none with one, after which a judge counts as dead
ATTEMPTS = 4  # requests for one answer
MOST_WAIT = 30.0  # seconds between two of them
MOST_BYTES = 1 << 20  # of an answer that is read
ASK_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504))  # HTTP statuses that may pass

PROMPT = """Two captions of this image follow. Which one describes it better? What is wrong or made up counts most, \
then what is missing. Length and style do not count.

Caption A: {a}

Caption B: {b}

Answer with JSON alone: {{"better": "A"}}, {{"better": "B"}} or {{"better": "tie"}}."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two captions of one image."""

    group: tuple[str, int]  # the image: source, row
    picture: str | None  # URL of the image, or a data URL; None: there is none, and the judge is not asked
    ours: str
    theirs: str


@dataclass(frozen=True, slots=True)
class Judged:
    """What the judge said of the pairs, and what that cost."""

    model: str
    pairs: int  # asked about
    wins: int  # of ours: better in both orders, or better in one and a tie in the other
    ties: int  # also two answers that contradict each other
    losses: int
    preference: float | None  # mean score; None if no pair was judged
    interval: tuple[float, float] | None
    first_place: float | None  # share of answers, ties left out, that chose the caption shown first
    unjudged: dict[str, int]  # pairs by reason: unreachable, slow, refused, malformed, given_up, no_image
    requests: int
    input_tokens: int
    output_tokens: int
    usd: float | None  # None without prices
    seconds: float
    scores: list[float | None] = field(default_factory=list, repr=False)  # of each pair; None: not judged

    def metrics(self) -> dict[str, float]:
        """The numbers under their MLflow names, `judge/...`."""
        counts = {name: getattr(self, name) for name in ("pairs", "wins", "ties", "losses", "requests", "seconds")}
        counts |= {"input_tokens": self.input_tokens, "output_tokens": self.output_tokens}
        counts["unjudged"] = sum(self.unjudged.values())
        found = {name: v for name in ("preference", "first_place", "usd") if (v := getattr(self, name)) is not None}
        ends = dict(zip(("preference_low", "preference_high"), self.interval, strict=True)) if self.interval else {}
        return {f"judge/{name}": float(value) for name, value in (counts | found | ends).items()}

    def __str__(self) -> str:
        cost = f"{self.requests} requests, {self.input_tokens:,} + {self.output_tokens:,} tokens"
        cost += "" if self.usd is None else f", ${self.usd:.4f}"
        lost = ", ".join(f"{count} {reason}" for reason, count in self.unjudged.items())
        lost = f"; not judged: {lost}" if lost else ""
        if self.preference is None or self.interval is None:
            return f"{self.model} judged none of {self.pairs} pairs ({cost}){lost}"
        low, high = self.interval
        return (
            f"{self.model} prefers ours in {self.preference:.1%} ({low:.1%} to {high:.1%}) of {self.pairs} pairs: "
            f"{self.wins} won, {self.ties} tied, {self.losses} lost ({cost}){lost}"
        )


class NoAnswerError(Exception):
    """A request got no answer; the text is the reason."""


def judge_pairs(pairs: Sequence[Pair], settings: JudgeSettings) -> Judged:
    """The judgement of the first `settings.pairs` pairs. Raises nothing that the judge does."""
    return asyncio.run(_Session(settings).judge(list(pairs[: settings.pairs])))


def parse_answer(text: str) -> str:
    """A, B or tie, from what the judge wrote: JSON, also within other text, or the bare word.

    Raises:
        NoAnswerError: `malformed` if it says nothing, or several things.
    """
    found = set(re.findall(r'"better"\s*:\s*"(A|B|tie)"', text, re.IGNORECASE))
    found = found or set(re.findall(r"^\W*(A|B|tie)\W*$", text.strip(), re.IGNORECASE))
    answers = {word.lower() for word in found}
    if len(answers) != 1:
        raise NoAnswerError("malformed")
    [answer] = answers
    return answer if answer == "tie" else answer.upper()


class _Session:
    """The requests of one judgement, their counts and their deadline."""

    def __init__(self, settings: JudgeSettings):
        self.settings, self.slots = settings, asyncio.Semaphore(settings.concurrency)
        self.deadline = time.monotonic() + settings.seconds
        self.requests = self.input_tokens = self.output_tokens = 0
        self.answers: Counter[str] = Counter()  # A, B, tie
        self.failures = 0
        self.last_failure = ""

    async def judge(self, pairs: list[Pair]) -> Judged:
        started = time.monotonic()
        limit = aiohttp.ClientTimeout(total=self.settings.timeout)  # of a whole request, also of one that trickles
        async with aiohttp.ClientSession(timeout=limit) as self.client:
            asked = [(i, swapped) for i in range(len(pairs)) for swapped in (False, True)]
            results = await asyncio.gather(*(self._score(pairs[i], swapped) for i, swapped in asked))
        scores: list[float | None] = []
        unjudged: Counter[str] = Counter()
        for first, second in zip(results[::2], results[1::2], strict=True):
            failed = [result for result in (first, second) if isinstance(result, str)]
            unjudged.update(failed[:1])
            scores.append(None if failed else (float(first) + float(second)) / 2)
        if unjudged:
            logger.warning("judge %s left %d pairs open: %s", self.settings.url, unjudged.total(), self.last_failure)
        return self._judged(pairs, scores, dict(unjudged), time.monotonic() - started)

    def _judged(
        self, pairs: list[Pair], scores: list[float | None], unjudged: dict[str, int], seconds: float
    ) -> Judged:
        known = [(pair.group, score) for pair, score in zip(pairs, scores, strict=True) if score is not None]
        interval = None
        if known:
            index = {group: i for i, group in enumerate(dict.fromkeys(group for group, _ in known))}
            table = np.zeros((len(index), 2))
            np.add.at(table, [index[group] for group, _ in known], [[score, 1] for _, score in known])
            interval = bootstrap(table, lambda sums: {"mean": sums[..., 0] / sums[..., 1]})["mean"]
        values = [score for _, score in known]
        chosen = self.answers["A"] + self.answers["B"]
        return Judged(
            model=self.settings.model,
            pairs=len(pairs),
            wins=sum(value > 0.5 for value in values),
            ties=sum(value == 0.5 for value in values),
            losses=sum(value < 0.5 for value in values),
            preference=math.fsum(values) / len(values) if values else None,
            interval=interval,
            first_place=self.answers["A"] / chosen if chosen else None,
            unjudged=unjudged,
            requests=self.requests,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            usd=self._usd(),
            seconds=seconds,
            scores=scores,
        )

    def _usd(self) -> float | None:
        prices = self.settings.usd_per_million_input, self.settings.usd_per_million_output
        if prices[0] is None or prices[1] is None:
            return None
        return (self.input_tokens * prices[0] + self.output_tokens * prices[1]) / 1e6

    async def _score(self, pair: Pair, swapped: bool) -> float | str:
        """The score of ours in one order, or why there is none."""
        if pair.picture is None:
            return "no_image"
        try:
            async with self.slots:
                answer = await self._answer(pair, swapped)
        except NoAnswerError as error:
            self.failures += 1
            self.last_failure = self.last_failure or str(error)
            return str(error)
        self.answers[answer] += 1
        return 0.5 if answer == "tie" else float((answer == "A") != swapped)

    async def _answer(self, pair: Pair, swapped: bool) -> str:
        reason = ""
        for attempt in range(ATTEMPTS):
            try:
                return await self._ask(pair, swapped)
            except _AskAgainError as error:
                reason, wait = str(error), min(MOST_WAIT, max(0.5 * 2**attempt, error.seconds))
            if attempt + 1 == ATTEMPTS or time.monotonic() + wait > self.deadline:
                break
            await asyncio.sleep(wait)
        raise NoAnswerError(reason)

    async def _ask(self, pair: Pair, swapped: bool) -> str:
        """One request."""
        left = self.deadline - time.monotonic()
        if left <= 0 or (not self.answers and self.failures >= WRITTEN_OFF):
            raise NoAnswerError("given_up")
        self.requests += 1
        try:
            async with asyncio.timeout(left):
                status, headers, body = await self._post(pair, swapped)
        except TimeoutError as error:
            raise NoAnswerError("slow") from error
        except (aiohttp.ClientError, OSError) as error:
            self.last_failure = f"{type(error).__name__}: {clean(str(error))}"
            raise _AskAgainError("unreachable") from error
        if status != 200:
            self.last_failure = f"HTTP status {status}: {clean(body[:200].decode(errors='replace'))}"
            if status in ASK_AGAIN:
                raise _AskAgainError("refused", _seconds(headers.get("Retry-After")))
            raise NoAnswerError("refused")
        return self._read(body)

    async def _post(self, pair: Pair, swapped: bool) -> tuple[int, Mapping[str, str], bytes]:
        ours, theirs = json.dumps(pair.ours), json.dumps(pair.theirs)  # quoted: a caption is no part of the prompt
        first, second = (theirs, ours) if swapped else (ours, theirs)
        content = [
            {"type": "image_url", "image_url": {"url": pair.picture}},
            {"type": "text", "text": PROMPT.format(a=first, b=second)},
        ]
        body = {
            **self.settings.options,
            "model": self.settings.model,
            "messages": [{"role": "user", "content": content}],
        }
        key = os.environ.get(self.settings.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        # A redirect would carry the key elsewhere.
        async with self.client.post(url, json=body, headers=headers, allow_redirects=False) as response:
            pieces, size = [], 0
            async for piece in response.content.iter_any():
                pieces.append(piece)
                size += len(piece)
                if size > MOST_BYTES:
                    raise NoAnswerError("malformed")
            return response.status, response.headers, b"".join(pieces)

    def _read(self, body: bytes) -> str:
        """The answer in a response, whose tokens are counted whatever it says."""
        try:
            answer: Any = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise NoAnswerError("malformed") from error
        usage = answer.get("usage") if isinstance(answer, dict) else None
        if isinstance(usage, dict):
            self.input_tokens += _count(usage.get("prompt_tokens"))
            self.output_tokens += _count(usage.get("completion_tokens"))
        try:
            text = answer["choices"][0]["message"]["content"]
        except (LookupError, TypeError) as error:
            raise NoAnswerError("malformed") from error
        if not isinstance(text, str):  # a model that declines sends null
            raise NoAnswerError("refused")
        return parse_answer(text)


class _AskAgainError(Exception):
    """A request failed in a way that may pass, after so many seconds if the judge says so."""

    def __init__(self, reason: str, seconds: float = 0.0):
        super().__init__(reason)
        self.seconds = seconds


def _seconds(header: str | None) -> float:
    """Seconds of a Retry-After header; 0 for none, and for a date."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _count(value: Any) -> int:
    """A number of tokens; 0 for what cannot be one."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else 0
