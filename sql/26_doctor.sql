-- What `listener doctor` asks the database, in sets: one query a function, however many tables there are. This file:
-- capture, progress, the server. sql/27_doctor_rights.sql: who may do what. sql/27_doctor_rows.sql: whose rows a view reads
-- and shows. sql/28_doctor_findings.sql puts them together.
--
-- A finding: check (a group of findings), level ('error': a view makes no progress, or tenants are not kept apart;
-- 'warning': it will hurt one day; 'ok': what was looked at and is well), view (NULL: no single one), object, problem
-- (one sentence), mend (the one command, SQL or shell; NULL with 'ok').

-- seconds_text(age): an age as people say it: '42 s', '5 min', '3 h'.
CREATE OR REPLACE FUNCTION listener.seconds_text(age interval) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN age < '2 min' THEN format('%s s', extract(epoch FROM age)::bigint)
                WHEN age < '2 h' THEN format('%s min', extract(epoch FROM age)::bigint / 60)
                ELSE format('%s h', extract(epoch FROM age)::bigint / 3600) END
$function$;

-- shell_word(text): the text as one word of a shell's command line.
CREATE OR REPLACE FUNCTION listener.shell_word(word text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT CASE WHEN word ~ '^[A-Za-z0-9_./:-]+$' THEN word
                ELSE '''' || replace(word, '''', '''\''''') || '''' END
$function$;

-- capture_findings(): whether each table that a view reads has its triggers: on every partition, enabled, ALWAYS, calling
-- what was generated. A foreign key that cascades, and TRUNCATE … CASCADE, fire the triggers of the table that they
-- reach: so it is each table's own that count. What is paused on purpose is one warning.
CREATE OR REPLACE FUNCTION listener.capture_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH known AS MATERIALIZED (
        SELECT s.*, c.oid::regclass::text AS source, c.relowner,
               (SELECT string_agg(v.name, ', ' ORDER BY v.name) FROM listener.view_source w
                JOIN listener.managed_view v ON v.id = w.view_id WHERE w.source_id = s.id) AS readers,
               EXISTS (SELECT FROM listener.source o WHERE o.through_id = s.id) AS is_looked_through
        FROM listener.source s JOIN pg_class c ON c.oid = s.relid
    ), trigger_state AS MATERIALIZED (
        SELECT k.id, w.relation, w.name,
               CASE WHEN g.oid IS NULL THEN 'missing'
                    WHEN g.tgenabled = 'D' THEN 'disabled'
                    WHEN g.tgenabled <> w.enabled THEN 'not enabled ALWAYS'
                    WHEN p.proname IS DISTINCT FROM w.function THEN 'calling another function' END AS wrong
        FROM known k CROSS JOIN LATERAL listener.wanted_triggers(k.id) w
        LEFT JOIN pg_trigger g ON g.tgrelid = w.relation AND g.tgname = w.name
        LEFT JOIN pg_proc p ON p.oid = g.tgfoid AND p.pronamespace = 'listener'::regnamespace
        WHERE NOT k.capture_paused
    ), per_source AS (
        SELECT t.id, count(*) AS triggers, count(DISTINCT t.relation) AS tables, count(t.wrong) AS wrong
        FROM trigger_state t GROUP BY t.id
    )
    SELECT 'capture', 'error', k.readers, t.relation::text,
           format('its capture triggers are %s: a write to it may go by unseen.',
                  string_agg(DISTINCT t.wrong, ' or ')), 'SELECT * FROM listener.repair_capture();'
    FROM trigger_state t JOIN known k ON k.id = t.id
    WHERE t.wrong IS NOT NULL
    GROUP BY k.readers, t.relation
    UNION ALL
    SELECT 'capture', 'ok', k.readers, k.source,
           format('%s triggers on %s, enabled ALWAYS and current', p.triggers,
                  CASE p.tables WHEN 1 THEN 'it' ELSE p.tables || ' tables' END), NULL
    FROM per_source p JOIN known k ON k.id = p.id
    WHERE p.wrong = 0
    UNION ALL
    SELECT 'capture', 'error', k.readers, k.source, 'its capture functions are not those that were generated.',
           format('SELECT listener.renew_capture(%L);', k.source)
    FROM known k
    WHERE k.capture_digest IS DISTINCT FROM listener.capture_digest(k.id)
    UNION ALL
    SELECT 'capture', 'warning', NULL, 'all sources', 'capture is paused: what is written is not seen until it is resumed.',
           'listener resume'
    WHERE EXISTS (SELECT FROM listener.source s WHERE s.capture_paused)
    UNION ALL
    SELECT 'capture', 'error', v.name, r.relid::regclass::text,
           format('%s reads it, and its changes do not reach that view.', v.name),
           -- A table that was made anew, as in a restored copy, is known by its name.
           CASE WHEN EXISTS (SELECT FROM listener.source s JOIN pg_class c ON c.relname = s.table_name
                             JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = s.schema_name
                             WHERE c.oid = r.relid AND s.relid <> r.relid)
                THEN 'SELECT * FROM listener.repair_capture();' ELSE 'SELECT * FROM listener.changed_definitions();' END
    FROM listener.managed_view v
    CROSS JOIN LATERAL listener.reads(to_regclass('listener.definition_' || v.id)) r
    WHERE r.relkind IN ('r', 'p') AND NOT EXISTS (
        SELECT FROM listener.view_source w JOIN listener.source s ON s.id = w.source_id
        WHERE w.view_id = v.id AND s.relid = r.relid)
    UNION ALL
    SELECT 'capture', 'warning', k.readers, k.source,
           format('it belongs to %I, of which %I is no member: triggers that somebody takes away could not be mended.',
                  pg_get_userbyid(k.relowner), i.owner_role),
           format('GRANT %I TO %I;', pg_get_userbyid(k.relowner), i.owner_role)
    FROM known k CROSS JOIN listener.installation i
    WHERE NOT pg_has_role(i.owner_role, k.relowner, 'USAGE')
    UNION ALL
    SELECT 'capture', 'warning', NULL, k.source, 'no view reads it, and each write to it is captured all the same.',
           format('SELECT listener.remove_source(%L);', k.source)
    FROM known k
    WHERE k.readers IS NULL AND NOT k.is_looked_through
    UNION ALL
    SELECT 'capture', 'warning', k.readers, k.source,
           format('its tenant column %I may be NULL: a row without a tenant refreshes every tenant.', a.attname),
           format('ALTER TABLE %s ALTER COLUMN %I SET NOT NULL;', k.source, a.attname)
    FROM known k JOIN pg_attribute a ON a.attrelid = k.relid AND a.attname = k.tenant_column AND NOT a.attisdropped
    JOIN pg_type t ON t.oid = a.atttypid
    WHERE NOT a.attnotnull AND NOT t.typnotnull
$function$;

-- progress_findings(): views that should be fresh and are not, and what waits for somebody's hand.
CREATE OR REPLACE FUNCTION listener.progress_findings()
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH service AS (
        SELECT EXISTS (SELECT FROM pg_stat_activity a
                       WHERE a.application_name = 'listener listen' AND a.datname = current_database()) AS runs
    ), stale AS (
        SELECT v.name, v.max_wait, count(*) AS keys, clock_timestamp() - min(k.dirty_since) AS age
        FROM listener.dirty k JOIN listener.managed_view v ON v.id = k.view_id AND v.paused_at IS NULL
        LEFT JOIN listener.refresh_state r ON r.view_id = k.view_id AND r.tenant = k.tenant
        -- One that fails is tried again, and is a dead letter soon.
        WHERE coalesce(r.failures, 0) = 0
        GROUP BY v.id
    ), limited AS (
        SELECT s.*, EXISTS (SELECT FROM listener.dead_letter d WHERE d.view_id = s.view_id AND d.status = 'open') AS has_letters,
               (SELECT p.name FROM listener.view_upstream u JOIN listener.managed_view p ON p.id = u.upstream_id
                WHERE u.view_id = s.view_id AND p.paused_at IS NOT NULL ORDER BY p.name LIMIT 1) AS paused_upstream
        FROM listener.staleness() s JOIN listener.managed_view v ON v.id = s.view_id AND v.paused_at IS NULL
        WHERE s.staleness > s.max_staleness
    ), undrained AS (
        SELECT clock_timestamp() - min(c.changed_at) AS age, count(*) AS changes FROM listener.unconsumed() c
    )
    SELECT 'progress', 'error', s.name, s.name,
           format('%s have been dirty for up to %s, and %s.', CASE s.keys WHEN 1 THEN 'the changes of 1 key' ELSE s.keys || ' keys' END,
                  listener.seconds_text(s.age),
                  CASE WHEN w.runs THEN format('max_wait is %s', listener.seconds_text(s.max_wait)) ELSE 'no service runs' END),
           CASE WHEN w.runs THEN 'listener sweep' ELSE 'listener run' END
    FROM stale s CROSS JOIN service w
    WHERE s.age > greatest(20 * s.max_wait, interval '1 min')
    UNION ALL
    SELECT 'progress', 'error', l.view_name, l.view_name,
           format('it does not show a change that is %s old, and its max_staleness is %s.',
                  listener.seconds_text(l.staleness), listener.seconds_text(l.max_staleness)),
           CASE WHEN l.has_letters THEN 'listener dead-letters retry --view ' || listener.shell_word(l.view_name)
                WHEN l.paused_upstream IS NOT NULL THEN 'listener resume ' || listener.shell_word(l.paused_upstream)
                WHEN w.runs THEN 'listener sweep' ELSE 'listener run' END
    FROM limited l CROSS JOIN service w
    UNION ALL
    SELECT 'progress', 'error', NULL, 'listener.change_log',
           format('%s logged up to %s ago, and nobody drained them%s.',
                  CASE u.changes WHEN 1 THEN '1 change was' ELSE u.changes || ' changes were' END, listener.seconds_text(u.age),
                  CASE WHEN w.runs THEN '' ELSE ': no service runs' END),
           CASE WHEN w.runs THEN 'listener sweep' ELSE 'listener run' END
    FROM undrained u CROSS JOIN service w
    WHERE u.age > interval '1 min'
    UNION ALL
    SELECT 'progress', 'warning', d.view_name, coalesce(d.view_name, 'dead letters'),
           CASE WHEN bool_or(d.view_id IS NOT NULL)
                THEN format('%s of it failed again and again, and %s open.',
                            CASE count(*) WHEN 1 THEN '1 key' ELSE count(*) || ' keys' END,
                            CASE count(*) WHEN 1 THEN 'its dead letter is' ELSE 'their dead letters are' END)
                ELSE format('%s refused, since no valid tenant was named.',
                            CASE count(*) WHEN 1 THEN '1 call was' ELSE count(*) || ' calls were' END) END,
           concat_ws(' ', 'listener dead-letters', CASE WHEN bool_or(d.view_id IS NOT NULL) THEN 'retry' ELSE 'discard' END,
                     coalesce('--view ' || listener.shell_word(d.view_name), '--all'))
    FROM listener.dead_letter d
    WHERE d.status = 'open'
    GROUP BY d.view_name, d.view_id IS NULL
    UNION ALL
    SELECT 'progress', 'warning', v.name, v.name,
           format('it has been paused for %s.', listener.seconds_text(clock_timestamp() - v.paused_at)),
           'listener resume ' || listener.shell_word(v.name)
    FROM listener.managed_view v
    WHERE v.paused_at < clock_timestamp() - interval '1 hour'
    UNION ALL
    -- Each costs its refreshes meanwhile.
    SELECT 'progress', 'warning', o.name, o.name,
           format('a new definition of it has stood beside it for %s, neither put in place nor taken back.',
                  listener.seconds_text(clock_timestamp() - v.created_at)),
           format('SELECT listener.abort_alter(%L);', o.name)
    FROM listener.managed_view v JOIN listener.managed_view o ON o.id = v.replaces
    WHERE v.created_at < clock_timestamp() - interval '1 hour'
    UNION ALL
    -- Whoever altered the view that read it was killed before he took them off.
    SELECT 'progress', 'warning', NULL, format('%I.%I', s.schema_name, s.table_name),
           'it has capture triggers, and no view reads it any more: its writers pay for nothing.',
           'SELECT listener.end_alter();'
    FROM listener.source s
    WHERE NOT s.explicit AND NOT EXISTS (SELECT FROM listener.view_source w WHERE w.source_id = s.id)
      AND NOT EXISTS (SELECT FROM listener.source o WHERE o.through_id = s.id)
    UNION ALL
    SELECT 'progress', 'warning', v.name, v.name,
           format('%s it was begun %s ago, and neither finished nor taken back.',
                  CASE a.state WHEN 'filling' THEN 'adopting' ELSE 'turning back' END,
                  listener.seconds_text(clock_timestamp() - a.begun_at)),
           format(CASE a.state WHEN 'turned back' THEN 'SELECT listener.drop_view(%L, keep_target => true);'
                               ELSE 'SELECT listener.abort_adoption(%L);' END, v.name)
    FROM listener.adoption a JOIN listener.managed_view v ON v.id = a.view_id
    WHERE a.state <> 'adopted' AND a.begun_at < clock_timestamp() - interval '1 hour'
    UNION ALL
    SELECT 'progress', 'ok', NULL, 'listener.change_log',
           format('%s not drained yet', CASE u.changes WHEN 1 THEN '1 change is' ELSE u.changes || ' changes are' END), NULL
    FROM undrained u
    WHERE u.age IS NULL OR u.age <= interval '1 min'
    UNION ALL
    SELECT 'progress', 'ok', v.name, v.name, 'it keeps up with its changes', NULL
    FROM listener.managed_view v
    WHERE v.paused_at IS NULL
      AND NOT EXISTS (SELECT FROM stale s WHERE s.name = v.name AND s.age > greatest(20 * s.max_wait, interval '1 min'))
      AND NOT EXISTS (SELECT FROM limited l WHERE l.view_id = v.id)
$function$;

-- zone_differs(one, other): whether two time zones show another local time in some season.
CREATE OR REPLACE FUNCTION listener.zone_differs(one text, other text) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT bool_or(m AT TIME ZONE one <> m AT TIME ZONE other)
    FROM unnest(ARRAY[date_trunc('year', now()), date_trunc('year', now()) + interval '6 months']) m
$function$;

-- server_findings(replica_connections, old): the server's settings, transactions that have been open for longer than
-- `old`, the time zone. Runs as its caller, who may see other sessions.
CREATE OR REPLACE FUNCTION listener.server_findings(replica_connections integer, old interval DEFAULT '15 min')
RETURNS TABLE ("check" text, level text, view text, object text, problem text, mend text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET jit = off AS $function$
    WITH setting AS (
        SELECT current_setting('max_prepared_transactions')::integer AS prepared,
               current_setting('max_connections')::integer AS connections,
               current_setting('max_locks_per_transaction')::integer
                   * (current_setting('max_connections')::integer + current_setting('max_prepared_transactions')::integer) AS locks,
               -- Each is taken away from whoever is no superuser; the second is there from 16 on.
               current_setting('superuser_reserved_connections')::integer
                   + coalesce(current_setting('reserved_connections', true)::integer, 0) AS reserved,
               (SELECT count(*)::integer FROM pg_stat_activity a WHERE a.backend_type = 'client backend') AS used,
               (SELECT count(*)::integer FROM listener.source_table) AS tables
    ), waiting AS (
        SELECT a.pid, a.usename, a.state, clock_timestamp() - a.xact_start AS age
        FROM pg_stat_activity a
        WHERE (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL) AND a.pid <> pg_backend_pid()
          AND a.backend_type = 'client backend' AND a.xact_start < clock_timestamp() - old
        ORDER BY a.xact_start LIMIT 1
    ), zone AS (
        SELECT coalesce(
            (SELECT regexp_replace(c.setting, '^timezone=', '', 'i') FROM pg_db_role_setting s
             JOIN pg_database d ON d.oid = s.setdatabase AND d.datname = current_database()
             CROSS JOIN LATERAL unnest(s.setconfig) AS c (setting)
             WHERE s.setrole = 0 AND c.setting ILIKE 'timezone=%'),
            (SELECT p.reset_val FROM pg_settings p WHERE p.name = 'TimeZone')) AS of_database
    )
    SELECT 'server', 'warning', NULL, 'max_prepared_transactions',
           'it is not 0, and capture notifies: PREPARE TRANSACTION refuses a transaction that has notified.',
           'SELECT listener.set_notify(''never'');'
    FROM setting s CROSS JOIN listener.installation i
    WHERE s.prepared > 0 AND i.notify IS NOT NULL AND i.notify <> 'never'
    UNION ALL
    SELECT 'server', 'ok', NULL, 'max_prepared_transactions',
           CASE WHEN s.prepared = 0 THEN 'it is 0: the doorbell may ring'
                ELSE format('it is %s: nothing notifies, the service polls', s.prepared) END, NULL
    FROM setting s CROSS JOIN listener.installation i
    WHERE s.prepared = 0 OR i.notify IS NULL OR i.notify = 'never'
    UNION ALL
    SELECT 'server', CASE WHEN current_setting(w.name) = 'on' THEN 'ok' ELSE 'warning' END, NULL, w.name,
           CASE WHEN current_setting(w.name) = 'on' THEN 'it is on' ELSE 'it is off: ' || w.without END,
           CASE WHEN current_setting(w.name) = 'on' THEN NULL ELSE format('ALTER SYSTEM RESET %s; SELECT pg_reload_conf();', w.name) END
    FROM (VALUES ('track_activities', 'explain cannot say who is in the way.'),
                 ('track_counts', 'nothing is vacuumed, and the change log only grows.'),
                 ('autovacuum', 'nothing is vacuumed, and the change log only grows.')) AS w (name, without)
    UNION ALL
    SELECT 'server', 'warning', NULL, c.oid::regclass::text, 'autovacuum is switched off for it, and it only grows.',
           format('ALTER TABLE %s RESET (autovacuum_enabled);', c.oid::regclass)
    FROM pg_class c
    WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind = 'r'
      AND EXISTS (SELECT FROM pg_options_to_table(c.reloptions) o
                  WHERE o.option_name = 'autovacuum_enabled' AND NOT o.option_value::boolean)
    UNION ALL
    SELECT 'server', 'warning', NULL, 'listener.change_log',
           format('it holds %s dead rows, and autovacuum does not keep up.', pg_stat_get_dead_tuples('listener.change_log'::regclass)),
           'VACUUM (ANALYZE) listener.change_log;'
    WHERE pg_stat_get_dead_tuples('listener.change_log'::regclass)
          > greatest(5000000, 10 * pg_stat_get_live_tuples('listener.change_log'::regclass))
    UNION ALL
    SELECT 'server', 'warning', NULL, format('backend %s', w.pid),
           format('a transaction of %s (%s) has been open for %s: what is consumed cannot be deleted until it ends.',
                  w.usename, w.state, listener.seconds_text(w.age)),
           format('SELECT pg_terminate_backend(%s);', w.pid)
    FROM waiting w
    UNION ALL
    SELECT 'server', CASE WHEN f.free < replica_connections THEN 'warning' ELSE 'ok' END, NULL, 'max_connections',
           format('%s of %s are free, and a replica needs up to %s', greatest(f.free, 0), s.connections, replica_connections)
           || CASE WHEN f.free < replica_connections THEN '.' ELSE '' END,
           CASE WHEN f.free < replica_connections
                THEN format('ALTER SYSTEM SET max_connections = %s;', s.connections + replica_connections) END
    FROM setting s CROSS JOIN LATERAL (SELECT s.connections - s.reserved - s.used) AS f (free)
    UNION ALL
    SELECT 'server', 'warning', NULL, quote_ident(r.rolname),
           format('its connection limit is %s, and a replica needs up to %s.', r.rolconnlimit, replica_connections),
           format('ALTER ROLE %I CONNECTION LIMIT -1;', r.rolname)
    FROM listener.installation i JOIN pg_roles r ON r.rolname = i.service_role
    WHERE r.rolconnlimit >= 0 AND r.rolconnlimit < replica_connections
    UNION ALL
    SELECT 'server', 'warning', NULL, quote_ident(d.datname),
           format('its connection limit is %s, and a replica needs up to %s.', d.datconnlimit, replica_connections),
           format('ALTER DATABASE %I CONNECTION LIMIT -1;', d.datname)
    FROM pg_database d
    WHERE d.datname = current_database() AND d.datconnlimit >= 0 AND d.datconnlimit < replica_connections
    UNION ALL
    -- Taking triggers on or off everything locks every table at once.
    SELECT 'server', CASE WHEN s.tables > s.locks / 2 THEN 'warning' ELSE 'ok' END, NULL, 'max_locks_per_transaction',
           format('%s tables carry triggers, and the server has room for %s locks', s.tables, s.locks)
           || CASE WHEN s.tables > s.locks / 2 THEN ': uninstall would run out.' ELSE '' END,
           CASE WHEN s.tables > s.locks / 2 THEN format('ALTER SYSTEM SET max_locks_per_transaction = %s;', 2 * s.tables) END
    FROM setting s
    UNION ALL
    SELECT 'time zone', 'warning', v.name, v.name,
           format('it is computed in %s, the database is in %s, and its definition depends on that (%s).', v.time_zone,
                  z.of_database, f.functions),
           format('ALTER DATABASE %I SET timezone = %L;', current_database(), v.time_zone)
    FROM zone z CROSS JOIN listener.managed_view v
    CROSS JOIN LATERAL (SELECT string_agg(d.what, ', ' ORDER BY d.what)
                        FROM listener.time_dependence(to_regclass('listener.definition_' || v.id)) d
                        WHERE d.dependence = 'time zone') AS f (functions)
    WHERE f.functions IS NOT NULL AND listener.zone_differs(v.time_zone, z.of_database)
    UNION ALL
    SELECT 'time zone', 'ok', NULL, z.of_database, 'the database''s; each view is computed in its own', NULL FROM zone z
$function$;
