"""Tries a chat template in a process of its own: it is a program of the checkpoint's, which may never end.

transformers renders templates in a sandbox, from which they reach neither files nor modules. But loops inside loops,
or a text repeated a billion times, would hold the job or eat the machine's memory.
"""

import json
import subprocess
import sys
from functools import lru_cache
from typing import Any

CPU_SECONDS, WAIT_SECONDS = 5, 120  # the wait is longer, as a busy machine gives the process little time
MEMORY_BYTES = 2**30  # of address space
MAX_CHARACTERS = 2**20  # of a prompt

_TEXT = {"type": "text", "text": "Describe this image."}
TRIALS: list[list[dict[str, Any]]] = [
    [*told, {"role": "user", "content": content}]
    for told in ([], [{"role": "system", "content": "Be brief."}], [{"role": "system", "content": [_TEXT]}])
    for content in ([{"type": "image"}, _TEXT], "<image>\nDescribe this image.")
]
"""Conversations of every form in which a template is asked."""

CHILD = """
import json, resource, sys
import jinja2, jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

class Generation(jinja2.ext.Extension):  # a block that transformers knows, which writes what it holds
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

def stop(message):
    raise jinja2.exceptions.TemplateError(message)

given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (given["seconds"], given["seconds"]))
resource.setrlimit(resource.RLIMIT_AS, (given["memory"], given["memory"]))
environment = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
environment.globals |= {"raise_exception": stop, "strftime_now": str}
environment.filters["tojson"] = lambda value, **_: json.dumps(value)
for messages in given["conversations"]:
    length = 0
    try:
        template = environment.from_string(given["template"])
        for piece in template.generate(messages=messages, tools=[], documents=None, **given["options"]):
            length += len(piece)
            if length > given["characters"]:
                sys.exit(3)
    except MemoryError:
        sys.exit(4)
    except Exception:  # the caller's own rendering says what is wrong
        pass
"""


class TemplateError(ValueError):
    """A chat template that does not end, or that writes or needs too much."""


def check_template(template: str, tokens: dict[str, str]) -> None:
    """Renders the template for `TRIALS`, in bounded time and memory. A process checks each template once.

    Args:
        tokens: {name: text} of the tokenizer's special tokens, which templates write.

    Raises:
        TemplateError: if the template does not stay within the bounds.
    """
    _check(template, json.dumps(tokens))


@lru_cache(maxsize=64)
def _check(template: str, tokens: str) -> None:
    given = {
        "template": template,
        "conversations": TRIALS,
        "options": {**json.loads(tokens), "add_generation_prompt": True, "enable_thinking": False},
        "seconds": CPU_SECONDS,
        "memory": MEMORY_BYTES,
        "characters": MAX_CHARACTERS,
    }
    try:
        ran = subprocess.run(
            [sys.executable, "-P", "-c", CHILD],
            input=json.dumps(given).encode(),
            capture_output=True,
            timeout=WAIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise TemplateError(f"it did not end in {WAIT_SECONDS} seconds") from error
    if ran.returncode == 3:
        raise TemplateError(f"it writes more than {MAX_CHARACTERS} characters")
    if ran.returncode == 4:
        raise TemplateError(f"it needs more than {MEMORY_BYTES // 2**20} MiB of memory")
    if ran.returncode < 0:
        raise TemplateError(f"it needs more than {CPU_SECONDS} seconds or {MEMORY_BYTES // 2**20} MiB of memory")
    if ran.returncode:
        said = ran.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise TemplateError(f"its trial failed: {''.join(said)}")
