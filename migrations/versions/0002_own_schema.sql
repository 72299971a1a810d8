-- How a view is refreshed:
--   tenant              by tenant, into a table
--   whole               as one key, into a table: its rows have no tenant, or read those of others
--   materialized view   as one key: REFRESH MATERIALIZED VIEW [CONCURRENTLY] of what the team has
-- A view that is not refreshed by tenant has one key, that of tenant ''.
ALTER TABLE listener.managed_view
    ADD COLUMN strategy text NOT NULL DEFAULT 'tenant' CHECK (strategy IN ('tenant', 'whole', 'materialized view')),
    ALTER COLUMN tenant_column DROP NOT NULL,
    ALTER COLUMN tenant_type DROP NOT NULL,
    ADD CHECK ((strategy = 'tenant') = (tenant_column IS NOT NULL)),
    ADD CHECK ((tenant_column IS NULL) = (tenant_type IS NULL));
