"""The one Jinja environment of all pages: self-contained HTML that opens offline and runs no script."""

import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parents[1]  # a page names its template by the folder that it lies in
PACKAGES = ("otprune", "torch", "transformers", "ray", "mlflow")


def render_page(
    template: str, *, kind: str, fingerprint: str, config_yaml: str, machines: tuple[str, ...] = (), **shown: Any
) -> str:
    """A page that extends report/base.html.jinja, e.g. "sweep/sweep.html.jinja".

    The head says the `kind` of the page, the `fingerprint` and the date; the foot says the packages, the `machines` and
    the configuration.

    Raises:
        jinja2.UndefinedError: if the template uses a name that is not in `shown`.
    """
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        _environment()
        .get_template(template)
        .render(
            kind=kind,
            fingerprint=fingerprint,
            config_yaml=config_yaml,
            machines=machines,
            made=made,
            packages=packages(),
            **shown,
        )
    )


def packages() -> dict[str, str]:
    """Python and the packages that decide speed, with their versions."""
    return {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
