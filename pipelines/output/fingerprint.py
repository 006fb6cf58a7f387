"""The fingerprint: one hash of everything that decides what a caption says. An output never mixes two fingerprints.

It covers model weights, prompt, pruning, decoding of images and of text, and this package's version. It leaves out
cluster size, batch sizes, unit size and store locations.
"""

import hashlib
import json
from dataclasses import replace
from typing import Any

from pipelines.errors import UserError
from pipelines.output.schema import CAPTIONS_FOLDER, PREDICTIONS_FOLDER
from pipelines.store import Store

FILE = "fingerprint.json"


def fingerprint(described: dict[str, Any]) -> str:
    """16 hex digits: the hash of a description, in which the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def claim_output(store: Store, described: dict[str, Any], on_mismatch: str, *, mark: bool = True) -> Store:
    """The store to write to, marked with `fingerprint.json`. Without `mark` nothing is written.

    The store is `store` itself, or, if `store` holds the output of another configuration and `on_mismatch` is `new`, a
    sibling folder.

    Raises:
        UserError: if the output belongs to another configuration and `on_mismatch` is `refuse`; the message names the
            keys that differ. Also if the output holds parts but no `fingerprint.json`.
    """
    mine = fingerprint(described)
    stored = read_claim(store)
    # A mark without parts binds nobody: a run that failed before its first unit may have left it.
    if stored is not None and fingerprint(stored) != mine and _parts_folder(store):
        if on_mismatch == "new":
            sibling = replace(store, path=f"{store.path}-{mine[:8]}")
            return claim_output(sibling, described, "refuse", mark=mark)
        raise UserError(
            f"{store.path} belongs to another configuration, which differs in {_differences(stored, described)}; "
            "choose another output.path, or output.on_mismatch=new for a sibling folder"
        )
    if stored is None or fingerprint(stored) != mine:
        if stored is None and (folder := _parts_folder(store)):
            raise UserError(
                f"{store.path} holds {folder} but no {FILE} that says how they were made; choose another output.path"
            )
        if mark:
            store.write(FILE, json.dumps(described, indent=1, sort_keys=True).encode())
    return store


def _parts_folder(store: Store) -> str:
    """The folder of the store that holds parts, or an empty string."""
    return next((folder for folder in (CAPTIONS_FOLDER, PREDICTIONS_FOLDER) if store.list(folder)), "")


def read_claim(store: Store) -> dict[str, Any] | None:
    """The description that an earlier run wrote into `fingerprint.json` of this output, or None.

    Raises:
        UserError: if the file is not a JSON object.
    """
    try:
        content = store.read(FILE)
    except FileNotFoundError:
        return None
    try:
        claim = json.loads(content)
    except ValueError as error:
        raise UserError(f"{store.path}/{FILE} must be JSON: {error}") from error
    if not isinstance(claim, dict):
        raise UserError(f"{store.path}/{FILE} must be a JSON object, got {type(claim).__name__}")
    return claim


def _differences(stored: dict[str, Any], mine: dict[str, Any]) -> str:
    """The keys whose values differ, with both values."""
    keys = sorted(k for k in {*stored, *mine} if stored.get(k) != mine.get(k))
    return ", ".join(f"{k} ({stored.get(k)!r} there, {mine.get(k)!r} here)" for k in keys)
