-- Materialized views that stay what they are: kept fresh as a whole, under one lock and with a window of their own.

-- keep_materialized_view(relation, ...): has a materialized view refreshed when what it reads changes: for one that cannot become
-- a table by tenant. Its changes are coalesced over a longer window than a tenant's, since each refresh computes everything.
--   quiet_period, max_wait, edge   the window: default 1 min, 5 min, trailing
--   max_age, timezone, depends_on  as for create_view
-- Refreshes with CONCURRENTLY where it has a unique index for that; else its readers wait during each refresh, and a
-- notice says so. The owner of this schema must be a member of the view's owner: only that role may refresh it. A
-- refresh that takes longer than LISTENER_STATEMENT_TIMEOUT is cancelled. Raises LSN03 where the relation is no
-- materialized view, the owner of this schema is no such member, or the view's owner does not see all rows: see
-- check_refreshable().
CREATE OR REPLACE FUNCTION listener.keep_materialized_view(
    relation regclass, quiet_period interval DEFAULT NULL, max_wait interval DEFAULT NULL, edge text DEFAULT NULL,
    max_age interval DEFAULT NULL, timezone text DEFAULT 'UTC', depends_on regclass[] DEFAULT NULL)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_variable
DECLARE
    previous_role text := listener.become_owner();
    kept record;
    view listener.managed_view;
    source_ids integer[];
BEGIN
    PERFORM listener.lock_registration();
    SELECT c.relname, n.nspname, c.relowner, c.relkind, listener.query_of(c.oid) AS query INTO kept
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = relation;
    IF kept.relkind IS DISTINCT FROM 'm' THEN
        RAISE EXCEPTION '% is no materialized view', coalesce(relation::text, 'NULL') USING ERRCODE = 'LSN03';
    ELSIF EXISTS (SELECT FROM listener.managed_view v WHERE v.target_schema = kept.nspname AND v.target_name = kept.relname) THEN
        RAISE EXCEPTION '% is managed already', relation USING ERRCODE = 'LSN03';
    ELSIF NOT pg_has_role(kept.relowner, 'USAGE') THEN
        RAISE EXCEPTION 'only %, who owns it, and its members may refresh %', pg_get_userbyid(kept.relowner), relation
            USING ERRCODE = 'LSN03', HINT = format('GRANT %I TO %I;', pg_get_userbyid(kept.relowner), current_user);
    END IF;
    PERFORM listener.check_written(relation, kept.query);
    PERFORM listener.check_refreshable(relation);
    view.target_schema := kept.nspname;
    view.target_name := kept.relname;
    view.name := listener.free_name(kept.nspname, kept.relname);
    view.query := kept.query;
    view.strategy := 'materialized view';
    view.key_columns := '{}';
    view.tenant_secured := false;
    view.target_rls := false;
    view.search_path := 'pg_catalog, pg_temp';
    view.depends_on := listener.qualified_names(depends_on);
    view.quiet_period := coalesce(quiet_period, least('1 min', max_wait));
    view.max_wait := coalesce(max_wait, greatest('5 min', view.quiet_period));
    view.edge := coalesce(edge, 'trailing');
    view.max_age := max_age;
    view.time_zone := timezone;
    PERFORM listener.check_window(view.quiet_period, view.max_wait, view.edge, view.max_age, view.time_zone);
    IF listener.concurrent_index(relation) IS NULL THEN
        RAISE NOTICE '% has no unique index on columns alone: its readers wait for each refresh', relation;
    END IF;
    view.id := nextval(pg_get_serial_sequence('listener.managed_view', 'id'));
    view.settings := listener.default_settings() - 'TimeZone';
    PERFORM listener.make_definition(view);
    view.settings := view.settings || listener.check_session(view.name, ARRAY[to_regclass('listener.definition_' || view.id)]);
    SELECT r.source_ids INTO source_ids
    FROM listener.register_sources(to_regclass('listener.definition_' || view.id), NULL, depends_on) r;
    PERFORM listener.create_default_tenants(view, source_ids);
    PERFORM listener.grant_definition(view);
    PERFORM listener.grant_kept(relation);
    PERFORM listener.register_view(view, source_ids);
    PERFORM set_config('role', previous_role, true);
END
$function$;

-- check_refreshable(relation): raises LSN03 where row-level security hides rows from the owner of a materialized view:
-- REFRESH runs the query as that role, with no tenant, and would empty the view.
CREATE OR REPLACE FUNCTION listener.check_refreshable(relation regclass) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    hidden regclass := listener.hidden_from_owner(relation);
    owner name := (SELECT pg_get_userbyid(c.relowner) FROM pg_class c WHERE c.oid = relation);
BEGIN
    IF hidden IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be refreshed: its owner % does not see all rows of % without a tenant, so REFRESH would empty it',
                relation, owner, hidden
            USING ERRCODE = 'LSN03',
                  HINT = format('Adopt it by tenant. Or let its owner see all rows, in each session of that role: '
                                'CREATE POLICY listener_refresh ON %s FOR SELECT TO %I USING (true);', hidden, owner);
    END IF;
END
$function$;

-- grant_kept(relation): what verify needs of it.
CREATE OR REPLACE FUNCTION listener.grant_kept(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    EXECUTE format('GRANT SELECT ON %s TO %I', relation, (SELECT i.service_role FROM listener.installation i));
END
$function$;

-- concurrent_index(relation): an index by which REFRESH MATERIALIZED VIEW CONCURRENTLY can tell the rows apart; NULL: none.
CREATE OR REPLACE FUNCTION listener.concurrent_index(relation regclass) RETURNS regclass
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT x.indexrelid::regclass FROM pg_index x
    WHERE x.indrelid = relation AND x.indisunique AND x.indisvalid AND x.indimmediate
      AND x.indpred IS NULL AND x.indexprs IS NULL
    ORDER BY x.indexrelid LIMIT 1
$function$;

-- refresh_statement(view): the body of listener_private.difference_<id>(tenant) for a materialized view. PostgreSQL
-- does not say how many rows changed. CONCURRENTLY needs a view that is populated. Row-level security may bind the
-- owner by now.
CREATE OR REPLACE FUNCTION listener.refresh_statement(view listener.managed_view) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT format($body$
BEGIN
    PERFORM listener.check_refreshable(%1$L::regclass);
    IF listener.concurrent_index(%1$L::regclass) IS NOT NULL
       AND (SELECT c.relispopulated FROM pg_class c WHERE c.oid = %1$L::regclass) THEN
        REFRESH MATERIALIZED VIEW CONCURRENTLY %1$s;
    ELSE
        REFRESH MATERIALIZED VIEW %1$s;
    END IF;
    $2 := 0;
    $3 := 0;
    $4 := 0;
END
$body$, format('%I.%I', view.target_schema, view.target_name))
$function$;
