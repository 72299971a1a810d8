SET ROLE listener_owner;

-- Who there is. Not under row-level security, so the service can list the tenants.
CREATE TABLE public.tenants (
    id uuid PRIMARY KEY,
    name text NOT NULL UNIQUE,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE public.revenue_ledger (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL REFERENCES public.tenants,
    transaction_id text NOT NULL,
    amount_cents bigint NOT NULL,
    revenue_cents bigint NOT NULL,
    currency char(3) NOT NULL,
    state text NOT NULL CHECK (state IN ('authorized', 'captured', 'refunded', 'chargeback')),
    is_verified boolean NOT NULL DEFAULT false,
    verification_timestamp timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant_id, transaction_id)
);
CREATE INDEX ON public.revenue_ledger (tenant_id, verification_timestamp);

-- Append-only: what happened is never rewritten.
CREATE TABLE public.attribution_events (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL REFERENCES public.tenants,
    occurred_at timestamptz NOT NULL,
    channel_code text NOT NULL,
    revenue_cents bigint NOT NULL,
    UNIQUE (tenant_id, id)
);

-- An allocation may have no event: the event was erased elsewhere, or never arrived. So no foreign key.
CREATE TABLE public.attribution_allocations (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL REFERENCES public.tenants,
    event_id uuid,
    channel_code text NOT NULL,
    model_version text NOT NULL,
    allocated_revenue_cents bigint NOT NULL,
    confidence_score numeric(5, 4) NOT NULL CHECK (confidence_score BETWEEN 0 AND 1),
    allocated_at timestamptz NOT NULL DEFAULT now(),
    UNIQUE (tenant_id, event_id, model_version, channel_code)
);
CREATE INDEX ON public.attribution_allocations (tenant_id, allocated_at);

-- Append-only: events that ingestion could not read.
CREATE TABLE public.dead_events (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL REFERENCES public.tenants,
    payload jsonb NOT NULL,
    error text NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE public.reconciliation_runs (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    tenant_id uuid NOT NULL REFERENCES public.tenants,
    state text NOT NULL CHECK (state IN ('running', 'completed', 'failed')),
    last_run_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON public.reconciliation_runs (tenant_id, last_run_at DESC, id DESC);

RESET ROLE;
