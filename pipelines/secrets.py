"""Keeps secrets in memory: takes them out of everything that is logged, shown, written or tracked.

Secrets are the userinfo of a URL (`https://user:password@host`), what signs a URL (`X-Amz-Signature`, `sig`, `token`,
...), values under names such as `hf_token` or `api_key`, and tokens that tell themselves by their shape. The
configuration and a `Store` hold them as they are, because that is where they open doors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HIDDEN = "***"
SECRET_ENDS = (
    *("token", "secret", "password", "passwd", "passphrase", "authorization", "signature", "credential", "credentials"),
    *("apikey", "accesskey", "accesskeyid", "secretkey", "privatekey", "sharedkey", "accountkey", "keypairid"),
    *("googleaccessid", "connectionstring"),
)  # of a name without its punctuation, in lower case: hf_token, X-Amz-Signature, AWSAccessKeyId
SECRET_NAMES = frozenset(("auth", "pwd", "pass", "sig", "jwt", "hmac", "cookie"))
SIGNING_NAMES = frozenset(("key", "policy"))  # these too in the query of a URL
USER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")  # container@account: what is before the @ is a place
PLACES = ("s3", "hf", "gs", "az", "memory", "file", *USER_SCHEMES)  # schemes whose addresses carry no credentials

# Each begins with a fixed text or a look behind, so that megabytes without a secret are passed once.
_USERINFO = re.compile(r"(?<=://)(?:[^\s/?#\"'<>]*@|[^\s/?#@\"'<>:\[]*:(?!\d+[/?#])[^\s@\"'<>]*@)")
_PARAMETER = re.compile(r"(?<=[?&;])([\w.%-]{1,80})=([^&\s\"'<>#]+)")
_NAMED = re.compile(r"(?<![\w.-])([\w.-]{1,80})(['\"]?\s?[=:]\s?)(['\"]?)((?:Bearer |Basic )?[^\s'\"&,;)}\]]{6,})")
_SHAPES = re.compile(r"(?<![\w-])(?:hf_\w{16,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|dapi[0-9a-f]{32})")


@dataclass(frozen=True, slots=True)
class Address:
    """A URL in its parts: what may be seen, and what may not."""

    public: str
    userinfo: str = ""
    query: str = ""  # the whole query, if any of it is secret


def is_secret(name: str) -> bool:
    """Whether a value under this name is a secret. Of a dotted name, the last part decides."""
    plain = re.sub(r"[^a-z0-9]", "", name.rpartition(".")[2].lower())
    return plain in SECRET_NAMES or plain.endswith(SECRET_ENDS)


def split_address(address: str) -> Address:
    """The parts of an address `scheme://...`; a path, or an address that carries no credentials, is public as it is."""
    scheme, mark, rest = address.partition("://")
    if not mark or scheme.lower() in PLACES:
        return Address(address)
    host = re.match(r"[^/?#]*", rest)[0]  # pyright: ignore[reportOptionalSubscript] - matches the empty text
    userinfo, at, _ = host.rpartition("@")
    rest = rest[len(userinfo + at) :]
    path, _, query = rest.partition("?")
    if scheme.lower() in ("http", "https") and without_secrets(f"?{query}") != f"?{query}":
        return Address(f"{scheme}://{path}", userinfo, query)
    return Address(f"{scheme}://{rest}", userinfo)


def without_userinfo(text: str) -> str:
    """The text, in which no URL names a user or a password any more."""
    return _USERINFO.sub(_no_user, text) if "://" in text and "@" in text else text


def without_secrets(text: str) -> str:
    """The text without the userinfo of its URLs, and with *** for every other secret in it."""
    text = _PARAMETER.sub(_no_value, without_userinfo(text))
    return _SHAPES.sub(HIDDEN, _NAMED.sub(_no_named_value, text)) if text else text


def public(value: Any) -> Any:
    """A value of a configuration or a record, for everybody to see: mappings and lists are gone through."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {name: HIDDEN if _hides(name, inner) else public(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(each) for each in value]
    return value


def deciding(value: Any) -> Any:
    """What is left of a value without its secrets and their names: the same whatever the secrets are.

    Of texts, only URLs change: two regular expressions for answers stay two.
    """
    if isinstance(value, str):
        return _PARAMETER.sub(_no_value, without_userinfo(value)) if "://" in value else value
    if isinstance(value, Mapping):
        return {name: deciding(inner) for name, inner in value.items() if not _hides(name, inner)}
    return [deciding(each) for each in value] if isinstance(value, list | tuple) else value


def _hides(name: Any, value: Any) -> bool:
    """Whether a value is a secret for its name. Numbers, flags and nothing are none."""
    return isinstance(name, str) and is_secret(name) and bool(value) and not isinstance(value, bool | int | float)


def _no_user(match: re.Match[str]) -> str:
    scheme = re.search(r"\w*$", match.string[: match.start() - len("://")][-20:])
    is_place = scheme is not None and scheme[0].lower() in USER_SCHEMES and ":" not in match[0]
    return match[0] if is_place else ""


def _no_value(match: re.Match[str]) -> str:
    signs = is_secret(match[1]) or match[1].lower() in SIGNING_NAMES
    return f"{match[1]}={HIDDEN}" if signs else match[0]


def _no_named_value(match: re.Match[str]) -> str:
    name, mark, quote, _ = match.groups()
    # Prose has a space after its colon, `the image token: <image>`; a mapping has quotes, a header its name.
    is_pair = "=" in mark or mark[0] in "'\"" or name.lower().endswith("authorization")
    return f"{name}{mark}{quote}{HIDDEN}" if is_pair and is_secret(name) else match[0]
