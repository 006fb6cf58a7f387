"""--help: the usage of a job, and its keys by section. Each key stands as a user types it, with its default."""

import os
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

from pipelines.config.check import describe
from pipelines.config.keys import Config
from pipelines.config.schema import Key, keys_of, sections_of

COLUMN = 34  # first column of the meanings
GLUE = "\xa0"  # no-break space: textwrap breaks lines at plain spaces only
BOLD, PLAIN = "\033[1m", "\033[0m"


def print_help(usage: str, schema: type[Config] = Config, without: Collection[str] = ()) -> None:
    """Prints `help_text` as wide as the terminal (80 to 120). Headings are bold unless the output is piped."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 80), 120)
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    try:
        print(help_text(usage, schema, without, width, bold), flush=True)
    except BrokenPipeError:  # `--help | head`. Python flushes again at exit: send the rest to /dev/null
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def help_text(
    usage: str, schema: type[Config] = Config, without: Collection[str] = (), width: int = 100, bold: bool = False
) -> str:
    """`usage`, then every key not in `without`: name=default, meaning, type. The job's own sections come first."""
    keys, defaults, sections = keys_of(schema), schema().dotted(), sections_of(schema)
    lines = [usage.strip(), "", "Keys with their defaults (defaults < the file of --config < arguments):"]
    for section in sorted(["", *sections], key=lambda name: name in sections_of(Config)):  # stable sort
        own = [k for k in keys.values() if k.name.rpartition(".")[0] == section and k.name not in without]
        if own:
            title = f"{section}: {sections[section].__doc__}" if section else "keys without a section"
            lines += ["", *(f"{BOLD}{line}{PLAIN}" if bold else line for line in textwrap.wrap(title, width))]
            lines += [line for k in own for line in _entry(k, defaults[k.name], width)]
    return "\n".join(lines)


def _entry(key: Key, default: Any, width: int) -> Iterator[str]:
    left = f"  {key.name}={_typed(default)}"
    kind = f"[{describe(key).removeprefix('a ')}]"
    # The type stays on one line if it fits on one: no-break spaces glue it together until textwrap is done.
    if len(kind) <= width - COLUMN:
        kind = kind.replace(" ", GLUE)
    text = textwrap.wrap(f"{key.meaning}  {kind}", width - COLUMN, break_long_words=False)
    meaning = [line.replace(GLUE, " ") for line in text]
    if len(left) > COLUMN - 2:  # too long to stand beside its meaning: the key gets lines of its own
        typed = left.strip() if len(left) <= width else left.strip().replace(",", ", ")
        yield from textwrap.wrap(typed, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False)
    else:
        yield left.ljust(COLUMN) + meaning.pop(0)
    yield from (" " * COLUMN + line for line in meaning)


def _typed(value: Any) -> str:
    """A default as a user types it after `key=`."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list():
            return f"[{','.join(map(_typed, value))}]"
        case str():
            return repr(value) if " " in value else value
        case _:
            return str(value)
