"""Materialized views whose owner is bound by FORCEd row-level security, from inventory to unadopt, without a superuser.

The owner sees no row without a tenant, so its own REFRESH would empty them. Three ways to write the policy are in use.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import psycopg
import pytest

from command import listener
from test_managed_services import Managed, managed

__all__ = ["managed"]  # a fixture of that module

A, B = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
POLICIES = {
    "strict": "current_setting('app.current_tenant_id')::uuid",
    "lenient": "current_setting('app.current_tenant_id', true)::uuid",
    "nullif": "NULLIF(current_setting('app.current_tenant_id', true), '')::uuid",
}
SCHEMA = """
CREATE TABLE orders (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid NOT NULL REFERENCES tenants,
                     cents int NOT NULL, at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON orders (tenant_id);
INSERT INTO tenants VALUES ('22222222-2222-4222-8222-222222222222');
INSERT INTO orders (tenant_id, cents) SELECT id, 100 FROM tenants;
ALTER TABLE orders ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON orders USING (tenant_id = {policy});
CREATE MATERIALIZED VIEW totals AS SELECT tenant_id, sum(cents) AS cents FROM orders GROUP BY tenant_id;
CREATE UNIQUE INDEX ON totals (tenant_id);
CREATE MATERIALIZED VIEW ages AS
SELECT tenant_id, extract(epoch FROM now() - max(at)) AS age FROM orders GROUP BY tenant_id;
ALTER TABLE orders FORCE ROW LEVEL SECURITY
"""
LIST = ("--tenants-query", "SELECT id FROM tenants")


class Team:
    """The team's database, and the commands that its administrator runs."""

    def __init__(self, managed: Managed) -> None:
        self.managed = managed

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """As the administrator."""
        return listener(*arguments, url=self.managed.database.url("managed_admin"), **self.managed.settings)

    def ok(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """It must succeed."""
        ended = self.run(*arguments)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended

    def stock(self, *options: str) -> dict[str, dict[str, Any]]:
        """What inventory says, by name."""
        return {view["relation"]: view for view in json.loads(self.ok("inventory", "--json", *options).stdout)["views"]}

    def rows(self, query: str, user: str = "managed_app") -> list[tuple[Any, ...]]:
        """What somebody sees who names no tenant."""
        with psycopg.connect(self.managed.database.url(user), autocommit=True) as connection:
            return connection.execute(query.encode()).fetchall()

    def order(self, tenant: str, cents: int) -> None:
        """One more."""
        with psycopg.connect(self.managed.database.url("managed_app"), autocommit=True) as application:
            application.execute("SELECT set_config('app.current_tenant_id', %s, false)", (tenant,))
            application.execute("INSERT INTO orders (tenant_id, cents) VALUES (%s, %s)", (tenant, cents))

    def kind(self, relation: str) -> str:
        """`m` a materialized view, `r` a table."""
        kinds = dict(self.rows("SELECT relname, relkind FROM pg_class"))
        return str(kinds[relation])

    def managed_views(self) -> list[tuple[Any, ...]]:
        """Their names."""
        return self.rows("SELECT name FROM listener.managed_view", "managed_service")


def opened(managed: Managed, policy: str) -> Team:
    """Installed as docs/managed-services.md tells, with what `inventory` prints granted."""
    managed.do("managed_app", SCHEMA.format(policy=POLICIES[policy]))
    managed.do("managed_admin", managed.command("roles", "--database", managed.database.name))
    managed.command("migrate")
    managed.do(
        "managed_admin",
        "GRANT managed_app TO managed_keeper; GRANT USAGE ON SCHEMA public TO managed_service;"
        "GRANT CREATE ON SCHEMA public TO managed_keeper",
    )
    managed.do("managed_app", "GRANT SELECT ON tenants, orders TO managed_service")
    return Team(managed)


@pytest.fixture(params=POLICIES)
def team(managed: Managed, request: pytest.FixtureRequest) -> Team:
    """By each form of the policy."""
    return opened(managed, request.param)


def test_from_adopt_to_unadopt_no_row_is_lost(team: Team) -> None:
    found = team.stock("--compare")["public.totals"]
    assert found["proposed"] == "tenant"
    hidden = "row-level security hides rows of public.orders from"
    assert f"REFRESH would empty it, or fail: {hidden} its owner managed_app" in found["why"]
    # What the owner would compute says nothing about the rows.
    assert hidden in found["staleness"]
    adopted = team.ok("adopt", "public.totals", *LIST)
    assert "by tenant" in adopted.stdout
    assert "its owner managed_app does not see all rows of public.orders" in adopted.stderr
    assert team.rows("SELECT tenant_id::text, cents::int FROM totals ORDER BY 1") == [(A, 100), (B, 100)]
    team.order(A, 5)
    team.ok("sweep")
    assert ", 0 stale, 0 different, 0 failed" in team.ok("verify").stdout
    team.order(B, 7)
    back = team.ok("unadopt", "public.totals")
    assert team.kind("totals") == "m"
    assert team.rows("SELECT tenant_id::text, cents::int FROM totals ORDER BY 1") == [(A, 105), (B, 107)]
    assert "totals_query" in back.stderr
    assert team.managed_views() == []
    # The query is as it was, and the same commands work again.
    team.ok("adopt", "public.totals", *LIST)
    assert team.rows("SELECT tenant_id::text, cents::int FROM totals ORDER BY 1") == [(A, 105), (B, 107)]
    team.ok("unadopt", "public.totals")
    assert team.rows("SELECT tenant_id::text, cents::int FROM totals ORDER BY 1") == [(A, 105), (B, 107)]


def test_a_column_that_counts_the_clock_is_adopted_verified_and_turned_back(team: Team) -> None:
    found = team.stock()["public.ages"]
    assert (found["proposed"], found["max_age"]) == ("tenant", 60)
    assert any("the column age counts the clock" in finding for finding in found["findings"])
    adopted = team.ok("adopt", "public.ages", *LIST)
    assert "the column age counts the clock" in adopted.stderr
    assert "each key is refreshed at least once a minute" in adopted.stderr
    verified = team.ok("verify", "ages")
    assert "0 different, 0 failed, 2 moved with the time" in verified.stdout
    told = json.loads(team.run("doctor", "--json").stdout)["findings"]
    assert any("the column age counts the clock" in finding["problem"] for finding in told)
    team.ok("unadopt", "ages")
    assert [row[0] >= 0 for row in team.rows("SELECT age FROM ages")] == [True, True]


def test_the_owner_gets_the_view_back_after_what_doctor_advises(managed: Managed) -> None:
    team = opened(managed, "nullif")
    team.ok("adopt", "public.totals", *LIST)
    findings = json.loads(team.run("doctor", "--json").stdout)["findings"]
    [mend] = [f["mend"] for f in findings if "managed_app, a role of the application, owns it" in f["problem"]]
    managed.do("managed_admin", mend)
    managed.do("managed_admin", "REVOKE CREATE ON SCHEMA public FROM managed_app")
    for options in ((), ("--dry-run",)):
        refused = team.run("unadopt", "totals", *options)
        assert refused.returncode == 1
        assert "GRANT CREATE ON SCHEMA public TO managed_app" in refused.stderr
    managed.do("managed_admin", "GRANT CREATE ON SCHEMA public TO managed_app")
    team.ok("unadopt", "totals")
    assert team.rows("SELECT relowner::regrole::text FROM pg_class WHERE relname = 'totals'") == [("managed_app",)]
