-- A schema as a team has it that never heard of listener: its own owner, its own roles, its own habits. Run as a
-- superuser in a database where listener is migrated; it grants listener what docs/setup.md asks for, and nothing else.
DO $$
DECLARE
    wanted text;
BEGIN
    -- Roles belong to all databases of the server, and stay.
    FOREACH wanted IN ARRAY '{acme_owner NOLOGIN, acme_app LOGIN, acme_dashboard LOGIN, acme_analyst LOGIN, acme_auditor LOGIN}'::text[] LOOP
        IF to_regrole(split_part(wanted, ' ', 1)) IS NULL THEN
            EXECUTE 'CREATE ROLE ' || wanted;
        END IF;
    END LOOP;
END
$$;
CREATE SCHEMA billing AUTHORIZATION acme_owner;
CREATE SCHEMA reporting AUTHORIZATION acme_owner;

-- What listener is given.
GRANT acme_owner TO listener_owner;
GRANT USAGE ON SCHEMA billing, reporting TO listener_service;

SET ROLE acme_owner;
GRANT USAGE ON SCHEMA billing TO acme_app;
GRANT USAGE ON SCHEMA billing, reporting TO acme_dashboard, acme_analyst, acme_auditor;

CREATE TABLE billing.tenants (id uuid PRIMARY KEY, name text NOT NULL);
CREATE TABLE billing.customers (
    id bigint PRIMARY KEY,
    tenant_id uuid NOT NULL REFERENCES billing.tenants,
    name text NOT NULL);
CREATE TABLE billing.invoices (
    id bigint GENERATED ALWAYS AS IDENTITY,
    tenant_id uuid NOT NULL,
    customer_id bigint NOT NULL,
    category text,
    currency char(3) NOT NULL,
    amount numeric(12, 2) NOT NULL,
    issued_on date NOT NULL,
    PRIMARY KEY (id, issued_on)) PARTITION BY RANGE (issued_on);
CREATE TABLE billing.invoices_2025 PARTITION OF billing.invoices FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
CREATE TABLE billing.invoices_2026 PARTITION OF billing.invoices FOR VALUES FROM ('2026-01-01') TO ('2027-01-01');
CREATE TABLE billing.invoices_other PARTITION OF billing.invoices DEFAULT;
CREATE TABLE billing.payments (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant_id uuid NOT NULL,
    customer_id bigint NOT NULL,
    amount numeric NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON billing.customers (tenant_id);
CREATE INDEX ON billing.invoices (tenant_id, issued_on);
CREATE INDEX ON billing.payments (tenant_id, received_at);

-- Strict: a session that names no tenant gets an error, not an empty table. A materialized view is computed with the
-- rights of its owner and with no tenant, and FORCE binds the owner too: so it needs a policy that lets it see all.
-- The planner folds `… OR true` to true, and the setting is never asked for.
DO $$
DECLARE
    source text;
BEGIN
    FOREACH source IN ARRAY '{customers,invoices,payments}'::text[] LOOP
        EXECUTE format('ALTER TABLE billing.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', source);
        EXECUTE format('CREATE POLICY tenant ON billing.%I
                        USING (tenant_id = current_setting(''app.current_tenant_id'')::uuid)', source);
        EXECUTE format('CREATE POLICY populate ON billing.%I FOR SELECT TO acme_owner USING (true)', source);
    END LOOP;
END
$$;
GRANT SELECT ON billing.tenants TO acme_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON billing.customers, billing.invoices, billing.payments TO acme_app;
GRANT SELECT ON ALL TABLES IN SCHEMA billing TO listener_service;
RESET ROLE;

INSERT INTO billing.tenants
SELECT ('00000000-0000-4000-8000-00000000000' || n)::uuid, 'Tenant ' || n FROM generate_series(1, 4) n;
INSERT INTO billing.customers
SELECT c, ('00000000-0000-4000-8000-00000000000' || 1 + c % 4)::uuid, 'Customer ' || c FROM generate_series(1, 40) c;
INSERT INTO billing.invoices (tenant_id, customer_id, category, currency, amount, issued_on)
SELECT c.tenant_id, c.id, (ARRAY['goods', 'services', NULL])[1 + i % 3], (ARRAY['EUR', 'USD'])[1 + i / 7 % 2],
       (i * 37 % 1000) + 0.25 * (i % 4), date '2025-06-01' + i % 400
FROM generate_series(1, 2000) i JOIN billing.customers c ON c.id = 1 + i % 40;
INSERT INTO billing.payments (tenant_id, customer_id, amount, received_at)
SELECT c.tenant_id, c.id, (i * 13 % 500)::numeric, now() - (i % 180) * interval '1 day' - interval '1 hour'
FROM generate_series(1, 1000) i JOIN billing.customers c ON c.id = 1 + i % 40;

SET ROLE acme_owner;
-- By tenant, with a unique index that has the tenant, another index, comments, options.
CREATE MATERIALIZED VIEW reporting.invoice_totals WITH (fillfactor = 90) AS
SELECT tenant_id, date_trunc('month', issued_on)::date AS month, currency, count(*) AS invoices, sum(amount) AS amount
FROM billing.invoices GROUP BY 1, 2, 3;
CREATE UNIQUE INDEX invoice_totals_key ON reporting.invoice_totals (tenant_id, month, currency);
CREATE INDEX invoice_totals_by_amount ON reporting.invoice_totals (amount DESC) WHERE invoices > 0;
ALTER MATERIALIZED VIEW reporting.invoice_totals ALTER COLUMN amount SET STATISTICS 500;
COMMENT ON MATERIALIZED VIEW reporting.invoice_totals IS 'What was invoiced, by month and currency.';
COMMENT ON COLUMN reporting.invoice_totals.month IS 'The month''s first day.';
COMMENT ON COLUMN reporting.invoice_totals.amount IS 'In whole units of the currency.';
COMMENT ON INDEX reporting.invoice_totals_by_amount IS 'For the top list.';

-- By tenant, with a unique index without the tenant: customers' ids are unique over all tenants.
CREATE MATERIALIZED VIEW reporting.customer_totals AS
SELECT c.id AS customer_id, c.tenant_id, c.name, coalesce(sum(i.amount), 0) AS invoiced
FROM billing.customers c LEFT JOIN billing.invoices i ON i.customer_id = c.id AND i.tenant_id = c.tenant_id
GROUP BY c.id, c.tenant_id, c.name;
CREATE UNIQUE INDEX customer_totals_customer ON reporting.customer_totals (customer_id);

-- A key that may be NULL, json, numeric.
CREATE MATERIALIZED VIEW reporting.category_notes AS
SELECT tenant_id, category, avg(amount) AS average,
       json_build_object('invoices', count(*), 'largest', max(amount)) AS details
FROM billing.invoices GROUP BY tenant_id, category;
CREATE UNIQUE INDEX category_notes_key ON reporting.category_notes (tenant_id, category);

-- Depends on the time: rows leave it with no write. No unique index.
CREATE MATERIALIZED VIEW reporting.recent_payments AS
SELECT tenant_id, customer_id, date_trunc('day', received_at) AS day, sum(amount) AS amount
FROM billing.payments WHERE received_at > now() - interval '90 days' GROUP BY 1, 2, 3;
CREATE INDEX recent_payments_customer ON reporting.recent_payments (customer_id);

-- Without a tenant.
CREATE MATERIALIZED VIEW reporting.currency_totals AS
SELECT currency, count(*) AS invoices, sum(amount) AS amount FROM billing.invoices GROUP BY currency;
CREATE UNIQUE INDEX currency_totals_key ON reporting.currency_totals (currency);

-- With a tenant, but a tenant's row depends on the other tenants' rows.
CREATE MATERIALIZED VIEW reporting.tenant_ranks AS
SELECT tenant_id, sum(amount) AS amount, rank() OVER (ORDER BY sum(amount) DESC) AS place
FROM billing.invoices GROUP BY tenant_id;
CREATE UNIQUE INDEX tenant_ranks_key ON reporting.tenant_ranks (tenant_id);

-- A name that needs quotes, and so do its columns.
CREATE MATERIALIZED VIEW reporting."Größte Kunden" AS
SELECT tenant_id AS "Mandant", customer_id AS "Kunde", max(amount) AS "Größte Rechnung"
FROM billing.invoices GROUP BY 1, 2;
CREATE UNIQUE INDEX "Größte Kunden Schlüssel" ON reporting."Größte Kunden" ("Mandant", "Kunde");

-- What others are tied to: a function returns its rows, a materialized view reads it.
CREATE MATERIALIZED VIEW reporting.customer_balances AS
SELECT tenant_id, customer_id, sum(amount) AS balance
FROM (SELECT tenant_id, customer_id, amount FROM billing.payments
      UNION ALL SELECT tenant_id, customer_id, -amount FROM billing.invoices) AS entries
GROUP BY 1, 2;
CREATE UNIQUE INDEX customer_balances_key ON reporting.customer_balances (tenant_id, customer_id);
CREATE FUNCTION reporting.balances_of(tenant uuid) RETURNS SETOF reporting.customer_balances
LANGUAGE sql STABLE AS 'SELECT * FROM reporting.customer_balances WHERE tenant_id = tenant';
CREATE MATERIALIZED VIEW reporting.balance_summary AS
SELECT tenant_id, count(*) AS customers, sum(balance) AS balance FROM reporting.customer_balances GROUP BY tenant_id;

-- Views on top, and one on top of that.
CREATE VIEW reporting.invoice_overview WITH (security_barrier = true) AS
SELECT tenant_id, month, sum(amount) AS amount FROM reporting.invoice_totals GROUP BY 1, 2;
CREATE VIEW reporting.invoice_years AS
SELECT tenant_id, date_trunc('year', month)::date AS year, sum(amount) AS amount
FROM reporting.invoice_overview GROUP BY 1, 2;
COMMENT ON VIEW reporting.invoice_overview IS 'All currencies together.';

GRANT SELECT ON ALL TABLES IN SCHEMA reporting TO acme_dashboard;
GRANT SELECT (tenant_id, month, amount) ON reporting.invoice_totals TO acme_analyst;
GRANT SELECT ON reporting.invoice_overview, reporting.currency_totals TO acme_analyst;
GRANT SELECT ON reporting.invoice_totals TO acme_auditor WITH GRANT OPTION;
RESET ROLE;
