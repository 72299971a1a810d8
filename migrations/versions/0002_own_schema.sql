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
    ADD CHECK ((tenant_column IS NULL) = (tenant_type IS NULL)),
    -- the view whose place it is to take, while a definition is being altered
    ADD COLUMN replaces integer UNIQUE REFERENCES listener.managed_view ON DELETE SET NULL;

-- Materialized views that were adopted, or are being: what it takes to turn back, beside what the target shows itself.
--   filling        the target is being filled under a name of its own beside the materialized view
--   adopted        it has its place
--   turning back   the materialized view is made anew beside the target
--   turned back    it has its place again, and the managed view is still to be dropped
CREATE TABLE listener.adoption (
    view_id integer PRIMARY KEY REFERENCES listener.managed_view ON DELETE CASCADE,
    state text NOT NULL CHECK (state IN ('filling', 'adopted', 'turning back', 'turned back')),
    schema_name name NOT NULL,
    relation_name name NOT NULL,
    -- the materialized view that was adopted; one that was made anew meanwhile is another
    relid oid NOT NULL,
    owner_role name NOT NULL,
    definition text NOT NULL,
    -- name -> {"unique": …, "rest": what follows USING}
    indexes jsonb NOT NULL,
    -- as listener.grants_of() gives them
    grants jsonb NOT NULL,
    -- what adopt was called with: called otherwise, it starts over
    request jsonb NOT NULL,
    begun_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    adopted_at timestamptz
);

-- What `listener doctor` compares with: the capture functions as they were generated, and the rights that the service's
-- role was given by the last migration (sql/29_grants.sql). OWNER: the function belongs to that role.
ALTER TABLE listener.source ADD COLUMN capture_digest text;
CREATE TABLE listener.needed_right (
    kind text NOT NULL CHECK (kind IN ('FUNCTION', 'TABLE', 'SEQUENCE')),
    object text NOT NULL,
    right_name text NOT NULL,
    PRIMARY KEY (kind, object, right_name)
);

-- Functions that have other arguments now: the files of sql/ make them beside these.
DROP FUNCTION IF EXISTS listener.make_definition(integer, text, text);
DROP FUNCTION IF EXISTS listener.create_default_tenants(integer, name, integer[]);
DROP FUNCTION IF EXISTS listener.set_window(text, interval, interval, text, interval);
