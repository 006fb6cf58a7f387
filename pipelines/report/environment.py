"""Renders HTML pages with Jinja. A page is one self-contained file that opens offline and runs no script."""

import platform
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.secrets import without_secrets

TEMPLATES = Path(__file__).parents[1]  # template names are relative to pipelines/, e.g. sweep/sweep.html.jinja
PACKAGES = ("otprune", "torch", "transformers", "ray", "mlflow")


def render_page(
    template: str, *, kind: str, fingerprint: str, config_yaml: str, machines: tuple[str, ...] = (), **shown: Any
) -> str:
    """Renders a template that extends report/base.html.jinja, e.g. "sweep/sweep.html.jinja"; returns HTML.

    The head of the page shows the `kind`, the `fingerprint` and the date; the foot shows the packages, the `machines`
    and the configuration. `shown` are the names that the template uses.

    Raises:
        jinja2.UndefinedError: if the template uses a name that is not in `shown`.
    """
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = (
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
    return without_secrets(page)


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that affect speed, by name."""
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
