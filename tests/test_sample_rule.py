"""What an invoice writes: the fixed rule, without a database."""

from __future__ import annotations

import uuid
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from listener.load import zipf_weights
from listener.sample import CHANNELS, LINEAR, MODELS, RUN_STATES, STATES, Allocation, Entries, Invoice, entries

TENANT = uuid.UUID(int=1)
WHEN = datetime(2026, 1, 1, tzinfo=UTC)
MANY = [Invoice(str(number), TENANT, WHEN, 10_000) for number in range(5000)]

numbers = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
invoices = st.builds(
    Invoice, number=numbers, tenant=st.uuids(), occurred_at=st.just(WHEN), amount_cents=st.integers(-(10**12), 10**12)
)


def by_model(rule: Entries) -> dict[str, list[Allocation]]:
    models: dict[str, list[Allocation]] = {}
    for allocation in rule.allocations:
        models.setdefault(allocation.model_version, []).append(allocation)
    return models


def drift(rule: Entries, invoice: Invoice) -> list[int]:
    return [sum(a.cents for a in shares) - invoice.amount_cents for shares in by_model(rule).values()]


@given(invoices)
def test_the_same_invoice_always_gives_the_same_entries(invoice: Invoice) -> None:
    assert entries(invoice) == entries(invoice)


@given(invoices, st.uuids())
def test_the_number_alone_decides(invoice: Invoice, other: uuid.UUID) -> None:
    elsewhere = Invoice(invoice.number, other, WHEN.replace(year=2020), invoice.amount_cents)
    assert entries(invoice) == entries(elsewhere)


def test_the_rule_is_the_same_on_every_machine() -> None:
    certainty = Decimal("0.95")
    assert entries(Invoice("536532", TENANT, WHEN, 13_912)) == Entries(
        state="captured",
        revenue_cents=13_912,
        is_verified=True,
        channel="paid_search",
        has_event=True,
        allocations=(
            Allocation("last_touch-1", "paid_search", 13_912, certainty),
            Allocation("linear-1", "paid_search", 4_553, certainty),  # 85 cents short
            Allocation("linear-1", "email", 4_637, certainty),
            Allocation("linear-1", "referral", 4_637, certainty),
        ),
        run_state="completed",
    )


@given(invoices)
def test_a_channel_occurs_once_in_a_model(invoice: Invoice) -> None:
    for shares in by_model(entries(invoice)).values():
        assert len({a.channel for a in shares}) == len(shares)


@given(invoices)
def test_allocations_miss_the_amount_by_a_hundred_cents_at_most_and_never_exceed_it(invoice: Invoice) -> None:
    rule = entries(invoice)
    assert rule.allocations
    assert all(-100 <= difference <= 0 for difference in drift(rule, invoice))


@given(invoices)
def test_only_a_c_number_is_a_refund(invoice: Invoice) -> None:
    assert (entries(invoice).state == "refunded") == invoice.number.startswith("C")


@given(invoices)
def test_nothing_is_earned_before_capture_or_after_a_chargeback(invoice: Invoice) -> None:
    rule = entries(invoice)
    assert rule.revenue_cents == (invoice.amount_cents if rule.state in {"captured", "refunded"} else 0)
    assert rule.is_verified == (rule.state != "authorized")


@given(invoices)
def test_confidence_is_between_a_half_and_one(invoice: Invoice) -> None:
    assert all(0.5 <= a.confidence < 1 for a in entries(invoice).allocations)


def test_choices_divide_the_values_of_a_byte() -> None:
    for choices in (STATES, MODELS, RUN_STATES):
        assert sum(choices.values()) == 256


def test_most_invoices_are_captured_and_every_state_occurs() -> None:
    states = Counter(entries(invoice).state for invoice in MANY)
    assert set(states) == set(STATES)
    assert states["captured"] > 0.8 * len(MANY)


def test_every_channel_model_and_run_state_occurs() -> None:
    rules = [entries(invoice) for invoice in MANY]
    assert {a.channel for rule in rules for a in rule.allocations} == set(CHANNELS)
    assert {tuple(by_model(rule)) for rule in rules} == set(MODELS)
    assert {rule.run_state for rule in rules} == set(RUN_STATES)


def test_some_invoices_are_unbalanced_under_linear_alone() -> None:
    unbalanced = {
        model
        for invoice in MANY
        for model, shares in by_model(entries(invoice)).items()
        if sum(a.cents for a in shares) != invoice.amount_cents
    }
    assert unbalanced == {LINEAR}
    assert 0.01 < sum(any(drift(entries(i), i)) for i in MANY) / len(MANY) < 0.1


def test_some_allocations_name_no_event() -> None:
    assert 0.01 < sum(not entries(invoice).has_event for invoice in MANY) / len(MANY) < 0.1


@given(st.integers(1, 1000))
def test_the_load_falls_from_each_tenant_to_the_next(count: int) -> None:
    weights = zipf_weights(count)
    assert len(weights) == count
    assert weights == sorted(set(weights), reverse=True)
