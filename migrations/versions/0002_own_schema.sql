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

-- What `listener doctor` compares with: the capture functions as they were generated, and the rights that the service's
-- role was given by the last migration (sql/29_grants.sql). OWNER: the function belongs to that role.
ALTER TABLE listener.source ADD COLUMN capture_digest text;
CREATE TABLE listener.needed_right (
    kind text NOT NULL CHECK (kind IN ('FUNCTION', 'TABLE', 'SEQUENCE')),
    object text NOT NULL,
    right_name text NOT NULL,
    PRIMARY KEY (kind, object, right_name)
);
