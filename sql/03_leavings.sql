-- What the code of a team may leave in a session, and its removal: see 03_computing.sql.

-- temporary_objects(): the temporary objects of this session.
CREATE OR REPLACE FUNCTION listener.temporary_objects() RETURNS oid[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF pg_my_temp_schema() = 0 THEN
        RETURN '{}'::oid[];
    END IF;
    RETURN ARRAY(SELECT d.objid FROM pg_depend d
                 WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = pg_my_temp_schema());
END
$function$;

-- deferred_writes(): how many rows this transaction has written to each table that has a user's trigger which may wait
-- for the end of the transaction.
CREATE OR REPLACE FUNCTION listener.deferred_writes() RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    RETURN (SELECT coalesce(jsonb_object_agg(g.tgrelid, w.count), '{}')
            FROM (SELECT DISTINCT t.tgrelid FROM pg_trigger t WHERE t.tgdeferrable AND NOT t.tgisinternal) g
            CROSS JOIN LATERAL (SELECT pg_stat_get_xact_tuples_inserted(g.tgrelid) + pg_stat_get_xact_tuples_updated(g.tgrelid)
                                       + pg_stat_get_xact_tuples_deleted(g.tgrelid)) AS w (count)
            WHERE w.count > 0);
END
$function$;

-- leave_nothing(before): removes what the code of a team may have left in this session, and what a later statement would
-- run with the rights of the session: prepared statements and cursors WITH HOLD of the client's current statement (by
-- their time, so those that the caller had before stay), temporary objects other than `before` (NULL: none is removed),
-- and, in the service's own sessions, advisory locks of the session. Raises where a temporary object cannot be dropped:
-- then nothing of what that code did stays.
CREATE OR REPLACE FUNCTION listener.leave_nothing(before oid[]) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp SET client_min_messages = 'error' AS $function$
DECLARE
    statement text;
    made record;
BEGIN
    -- One query for both: each refresh asks. With the word PREPARE, which may be the name of one.
    FOR statement IN
        SELECT format('DEALLOCATE PREPARE %I', p.name) FROM pg_prepared_statement() p
        WHERE p.from_sql AND p.prepare_time = statement_timestamp()
        UNION ALL
        SELECT format('CLOSE %I', c.name) FROM pg_cursor() c WHERE c.is_holdable AND c.creation_time = statement_timestamp()
    LOOP
        EXECUTE statement;
    END LOOP;
    IF session_user = (SELECT i.service_role FROM listener.installation i) THEN
        PERFORM pg_advisory_unlock_all();
    END IF;
    WHILE before IS NOT NULL AND pg_my_temp_schema() <> 0 LOOP
        SELECT o.type, o.identity INTO made
        FROM pg_depend d CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) o
        WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = pg_my_temp_schema() AND d.objid <> ALL (before) LIMIT 1;
        EXIT WHEN NOT FOUND;
        EXECUTE format('DROP %s %s CASCADE', made.type, made.identity);
    END LOOP;
END
$function$;
