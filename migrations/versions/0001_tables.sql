-- The tables of the schema `listener`. Functions and views over them live in sql/ and are re-applied after each
-- migration; nothing here is written by hand at run time.

-- One row: what was decided when the schema was installed, and which database it was in when somebody last looked:
-- in any other (a restored copy) stored object ids and transaction ids mean nothing.
CREATE TABLE listener.installation (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    owner_role name NOT NULL,
    service_role name NOT NULL,
    -- NULL: when_idle, or never where prepared transactions are allowed, since they cannot notify
    notify text CHECK (notify IN ('when_idle', 'always', 'never')),
    system_identifier bigint,
    database_oid oid,
    installed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- A user's table that has capture triggers, and how its rows find their tenant: by `tenant_column`; or, where
-- `through_id` is set, by a look-up (`through_keys` of this table equal `through_references` of that source's); or not
-- at all, where the table is shared by all tenants. A table that two views read by different tenant columns is two
-- sources.
CREATE TABLE listener.source (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    schema_name name NOT NULL,
    table_name name NOT NULL,
    relid oid NOT NULL,
    tenant_column name,
    through_id integer REFERENCES listener.source,
    through_keys name[],
    through_references name[],
    -- a foreign key that cascades says that a row which finds nothing lost its parent in the same transaction
    through_cascades boolean NOT NULL DEFAULT false,
    -- said by add_source rather than found by create_view: it wins, and it stays when the last view that reads it goes
    explicit boolean NOT NULL DEFAULT false,
    capture_paused boolean NOT NULL DEFAULT false,
    CHECK ((through_id IS NULL) = (through_keys IS NULL)),
    CHECK (through_id IS NULL OR tenant_column IS NULL)
);
CREATE UNIQUE INDEX ON listener.source (schema_name, table_name, tenant_column, through_id) NULLS NOT DISTINCT;
CREATE UNIQUE INDEX ON listener.source (schema_name, table_name) WHERE explicit;

-- The tables that carry a source's triggers: the table itself, and each of its partitions, since a trigger on the root
-- does not see a statement that names a leaf. `fingerprint` is what the catalog said of the triggers and of the
-- partition's place when they were last known to be right.
CREATE TABLE listener.source_table (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source_id integer NOT NULL REFERENCES listener.source ON DELETE CASCADE,
    schema_name name NOT NULL,
    table_name name NOT NULL,
    relid oid NOT NULL,
    fingerprint text,
    UNIQUE (source_id, relid)
);

-- A managed view: a query (the view listener.definition_<id>), the table that holds its result (the target), its key
-- columns, its tenant column, its window.
CREATE TABLE listener.managed_view (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL UNIQUE,
    target_schema name NOT NULL,
    target_name name NOT NULL,
    query text NOT NULL,
    key_columns name[] NOT NULL,
    tenant_column name NOT NULL,
    tenant_type text NOT NULL,
    tenants_query text,
    depends_on text[],
    quiet_period interval NOT NULL CHECK (quiet_period >= '0'),
    max_wait interval NOT NULL CHECK (max_wait >= quiet_period),
    edge text NOT NULL CHECK (edge IN ('leading', 'trailing')),
    max_age interval CHECK (max_age > '0'),
    time_zone text NOT NULL,
    search_path text NOT NULL,
    tenant_secured boolean NOT NULL,
    target_rls boolean NOT NULL,
    fingerprint text NOT NULL,
    paused_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (target_schema, target_name)
);

CREATE TABLE listener.view_source (
    view_id integer NOT NULL REFERENCES listener.managed_view ON DELETE CASCADE,
    source_id integer NOT NULL REFERENCES listener.source,
    -- the source writes a tenant as the view does; else the drain brings it into the view's form
    same_form boolean NOT NULL,
    PRIMARY KEY (view_id, source_id)
);
CREATE INDEX ON listener.view_source (source_id, view_id);

-- What capture appends to. Either source_id (a change of that table) or view_id (a mark made by this schema itself)
-- is set. tenant '' stands for all tenants: '' is never a tenant, because a setting that was once set locally reads ''
-- afterwards, so a refresh for '' would be one without a tenant.
-- No primary key: nothing ever looks a row up but by xid, and a key is a second index to write for every change.
CREATE TABLE listener.change_log (
    xid xid8 NOT NULL,
    changed_at timestamptz NOT NULL,
    source_id integer,
    view_id integer,
    tenant text NOT NULL,
    app_correlation_id text
) WITH (
    autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 100000,
    autovacuum_analyze_scale_factor = 0.0, autovacuum_analyze_threshold = 50000
);
CREATE INDEX change_log_xid ON listener.change_log (xid);
-- Without a key, a publication FOR ALL TABLES would refuse the deletion of consumed rows.
ALTER TABLE listener.change_log REPLICA IDENTITY FULL;

-- One row per drain that found something; ids rise by one. The newest row is the cursor: what a later drain has not
-- seen is what was not visible in `snapshot`, or was written by the drain's own transaction `xid` afterwards. Stored
-- transaction ids mean something only in the cluster and database that gave them out, hence the last two columns.
CREATE TABLE listener.drain_log (
    id bigint PRIMARY KEY,
    drained_at timestamptz NOT NULL,
    snapshot pg_snapshot NOT NULL,
    xid xid8 NOT NULL,
    changes bigint NOT NULL,
    keys bigint NOT NULL,
    correlation_id text NOT NULL,
    system_identifier bigint NOT NULL,
    database_oid oid NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000);

-- Written by the drain alone, and only appended to: a row says that the drain with this id found the key changed, and
-- the newest row's version is the key's. Together with refresh_state it is the durable debounce queue: a key is dirty
-- while it has a row above its refreshed_version. Rows at or below it are deleted in bulk by purge().
-- Appended to, because a hot key's row that was updated at each drain would pile up dead versions while a snapshot is
-- held open elsewhere, and reading it would get slower and slower; the newest entry of an index does not.
-- The row of tenant '' stands for "all tenants of this view, not yet expanded".
CREATE TABLE listener.dirty_key (
    view_id integer NOT NULL,
    tenant text NOT NULL,
    version bigint NOT NULL,
    first_change_at timestamptz NOT NULL,
    last_change_at timestamptz NOT NULL,
    -- came from a filling or a shared table rather than from a tenant's own write: served at low priority
    bulk boolean NOT NULL,
    correlation_id text NOT NULL,
    app_correlation_id text,
    PRIMARY KEY (view_id, tenant, version)
) WITH (autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
        autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 200000);
-- For what asks for all keys from a version on, written the same way there. On the plain column it would be taken for a
-- single key's newest version too, wherever statistics say that the table is small, and all keys be read to find it.
CREATE INDEX dirty_key_version ON listener.dirty_key ((version + 0));

-- How far purge() got; the newest row counts. Reading starts there, so it never crosses what was deleted: dead index
-- entries stay for as long as somebody's old snapshot does.
CREATE TABLE listener.purge_mark (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- no log row below this transaction id is left
    log_from xid8 NOT NULL,
    -- no dirty_key row below this version is left
    dirty_from bigint NOT NULL
);

-- Tenants that rows of a looked-up table moved to, and the transaction that moved them. A writer of a row that looks its
-- tenant up may not see the move yet, log the old tenant, and commit after the new one was refreshed. So drain() marks
-- these tenants again, once every transaction has ended that may have looked before the move was committed.
CREATE TABLE listener.moved_tenant (
    xid xid8 NOT NULL,
    source_id integer NOT NULL,
    tenant text NOT NULL
);
ALTER TABLE listener.moved_tenant REPLICA IDENTITY FULL;

-- The doorbell's lease: until when (milliseconds since 1970, by the server's clock) somebody polls, so that nobody
-- needs to notify. A sequence, because it is read in a microsecond, seen at once, and leaves no dead versions.
CREATE SEQUENCE listener.doorbell AS bigint MINVALUE 0;

-- Written by the refresh alone, and by record_failure() after a refresh that was rolled back; one row per key, since both
-- hold the key's advisory lock. Not a unique key but an index whose newest entry is the row: while a snapshot is held
-- open elsewhere a hot key's dead versions pile up, and each look at a unique key would cross all of them.
CREATE TABLE listener.refresh_state (
    view_id integer NOT NULL,
    tenant text NOT NULL,
    refreshed_version bigint NOT NULL,
    started_at timestamptz,
    refreshed_at timestamptz,
    duration interval,
    inserted bigint NOT NULL DEFAULT 0,
    updated bigint NOT NULL DEFAULT 0,
    deleted bigint NOT NULL DEFAULT 0,
    correlation_id text,
    failures integer NOT NULL DEFAULT 0,
    failed_at timestamptz,
    retry_at timestamptz,
    last_error text
) WITH (autovacuum_vacuum_scale_factor = 0.05);
CREATE INDEX refresh_state_newest ON listener.refresh_state (view_id, tenant, refreshed_at NULLS FIRST);
-- Without a key, a publication FOR ALL TABLES would refuse its updates.
ALTER TABLE listener.refresh_state REPLICA IDENTITY FULL;

CREATE TABLE listener.dead_letter (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    view_id integer,
    view_name text,
    tenant text,
    error_type text NOT NULL,
    sqlstate text,
    exception_class text NOT NULL,
    error_message text NOT NULL,
    traceback text,
    arguments jsonb NOT NULL DEFAULT '{}',
    worker text,
    retry_count integer NOT NULL DEFAULT 0,
    status text NOT NULL DEFAULT 'open' CHECK (status IN ('open', 'resolved', 'discarded')),
    correlation_id text NOT NULL,
    app_correlation_id text,
    failed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_at timestamptz
);
-- One open letter per key; letters without a key (a malformed call) are open as often as they are written.
CREATE UNIQUE INDEX dead_letter_open ON listener.dead_letter (view_id, tenant)
    WHERE status = 'open' AND view_id IS NOT NULL AND tenant IS NOT NULL;
