"""The spend cap: a limit on the dollars of all runs of an output together. It needs the price of every node."""

import logging
from collections import Counter

from pipelines.dollars.account import Account
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

ADVICE = "set cost.usd_per_hour for the whole cluster, or price its nodes by cost.prices and labels"


def check_prices(cap: float | None, account: Account) -> None:
    """Warns of nodes without a price, and of earlier runs that the cap cannot count.

    Raises:
        UserError: if there is a cap and a node has no price.
    """
    unpriced, earlier = account.meter.unpriced, account.earlier.unpriced
    if cap is not None and earlier:
        logger.warning("budget.max_usd does not count %d earlier runs of this output: no price", earlier)
    if unpriced and cap is not None:
        raise UserError(f"budget.max_usd={cap:g} needs the price of every node: {_list_problems(unpriced)}; {ADVICE}")
    if unpriced:
        logger.warning("not in the dollars: %s; %s", _list_problems(unpriced), ADVICE)


def over_budget(cap: float | None, usd: float | None, account: Account) -> str:
    """The reason to stop the run, now that the output has cost `usd`; empty if the run may go on."""
    if cap is None:
        return ""
    if account.meter.unpriced:  # a node joined after `check_prices`
        problems = _list_problems(account.meter.unpriced)
        return f"stopped, because budget.max_usd={cap:g} cannot be kept: {problems}; {ADVICE}"
    if usd is None or usd < cap:
        return ""
    earlier = account.earlier
    share = f", ${earlier.usd:.4f} of it by {earlier.runs} earlier runs" if earlier.usd else ""
    return f"stopped at budget.max_usd={cap:g}: ${usd:.4f} spent on this output{share}; a higher cap resumes"


def _list_problems(unpriced: Counter[str]) -> str:
    return "; ".join(f"{count} node{'s' * (count > 1)}: {problem}" for problem, count in unpriced.items())
