"""The spend cap: what the runs of an output may cost together, and that it can be kept at all."""

import logging
from collections import Counter

from pipelines.dollars.account import Account
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

ADVICE = "set cost.usd_per_hour for the whole cluster, or price its nodes by cost.prices and labels"


def check_prices(cap: float | None, account: Account) -> None:
    """Says which nodes have no price, and which earlier runs the cap does not count.

    Raises:
        UserError: if there is a cap, which needs the price of every node.
    """
    unpriced, earlier = account.meter.unpriced, account.earlier.unpriced
    if cap is not None and earlier:
        logger.warning("budget.max_usd does not count %d earlier runs of this output: no price", earlier)
    if unpriced and cap is not None:
        raise UserError(f"budget.max_usd={cap:g} needs the price of every node: {_listed(unpriced)}; {ADVICE}")
    if unpriced:
        logger.warning("not in the dollars: %s; %s", _listed(unpriced), ADVICE)


def over_budget(cap: float | None, usd: float | None, account: Account) -> str:
    """Why the run has to stop, now that the output has cost `usd`; empty if it may go on."""
    if cap is None:
        return ""
    if account.meter.unpriced:  # a node that joined in mid-run
        return f"stopped, as budget.max_usd={cap:g} cannot be kept: {_listed(account.meter.unpriced)}; {ADVICE}"
    if usd is None or usd < cap:
        return ""
    earlier = account.earlier
    share = f", ${earlier.usd:.4f} of it by {earlier.runs} earlier runs" if earlier.usd else ""
    return f"stopped at budget.max_usd={cap:g}: ${usd:.4f} spent on this output{share}; a higher cap resumes"


def _listed(unpriced: Counter[str]) -> str:
    return "; ".join(f"{count} node{'s' * (count > 1)}: {problem}" for problem, count in unpriced.items())
