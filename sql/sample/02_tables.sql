-- The tables of the sample: a revenue ledger, and the marketing events and allocations that explain it.
--
-- The tenant leads every key: one tenant's rows lie together in each index, and the tenant's predicate, which
-- row-level security adds to every query anyway, is what the index is entered by.
-- No table has a foreign key to tenants: each insert would lock the tenant's row, which all its writers share.
SET ROLE listener_owner;
SET search_path = public;

-- No row-level security: the service lists the tenants from here.
CREATE TABLE tenants (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The key serves both views of the ledger: they read all of a tenant's rows, whatever their date or state.
-- An index on either would serve neither, and every change of state would have to write it.
CREATE TABLE revenue_ledger (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL,
    amount_cents bigint NOT NULL,
    -- What the tenant earned: nothing yet while authorized, nothing any more after a chargeback.
    revenue_cents bigint NOT NULL,
    currency text NOT NULL CHECK (currency ~ '^[A-Z]{3}$'),
    state text NOT NULL CHECK (state IN ('authorized', 'captured', 'refunded', 'chargeback')),
    is_verified boolean NOT NULL DEFAULT false,
    verification_timestamp timestamptz,
    transaction_id text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);

-- Append-only.
CREATE TABLE attribution_events (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL,
    occurred_at timestamptz NOT NULL,
    channel_code text NOT NULL,
    revenue_cents bigint NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);

-- No foreign key to the event: events age out before their allocations do, and may arrive after them.
CREATE TABLE attribution_allocations (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL,
    event_id uuid,
    channel_code text NOT NULL,
    model_version text NOT NULL,
    allocated_revenue_cents bigint NOT NULL,
    confidence_score numeric NOT NULL CHECK (confidence_score BETWEEN 0 AND 1),
    allocated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id),
    -- NULLs are distinct: a channel may have any number of allocations without an event.
    UNIQUE (tenant_id, event_id, model_version, channel_code)
);
-- The last ninety days of mv_channel_performance.
CREATE INDEX ON attribution_allocations (tenant_id, allocated_at);

-- Events that could not be taken in. Append-only.
CREATE TABLE dead_events (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    payload jsonb NOT NULL,
    error text NOT NULL,
    PRIMARY KEY (tenant_id, id)
);

CREATE TABLE reconciliation_runs (
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL,
    state text NOT NULL CHECK (state IN ('running', 'completed', 'failed')),
    last_run_at timestamptz NOT NULL DEFAULT now(),
    created_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (tenant_id, id)
);
-- The latest run comes first; the id decides between two of the same time.
CREATE INDEX ON reconciliation_runs (tenant_id, last_run_at DESC, id DESC);

RESET search_path;
RESET ROLE;
