"""Two plans side by side, in words: what one is predicted to take in place of the other."""

from __future__ import annotations

from prefect_slo.plan import Plan, Prediction


def compared(wished: Plan, made: Plan) -> str:
    """What a plan is predicted to take in place of another; empty where either is not predicted."""
    if wished.predicted is None or made.predicted is None:
        return ""
    before, after = wished.predicted, made.predicted
    return f"predicted {_said(after)} a run in place of {_said(before)} ({_more(before, after)})"


def _said(prediction: Prediction) -> str:
    return f"{prediction.latency_s.mean:.3g} s and ${prediction.cost_usd.mean:.3g}"


def _more(before: Prediction, after: Prediction) -> str:
    seconds = after.latency_s.mean - before.latency_s.mean
    dollars = after.cost_usd.mean - before.cost_usd.mean
    return f"{seconds:+.3g} s, {'-' if dollars < 0 else '+'}${abs(dollars):.3g}"
