-- Repair: what no trigger can see is noticed in the catalog, by the sweep.

-- repair_capture(): compares what the catalog says of every source with what was noted, and mends what is no longer
-- as it was: a trigger disabled or dropped, a partition attached, detached or added, a table renamed or made anew, a
-- column renamed, a subscription that fills a table, a restored copy. Where a write may have gone by unseen, every
-- tenant of the views that read the source is marked dirty. Called by every sweep; nothing to mend is one query.
--   source, outcome ('repaired', 'renamed', 'failed'), detail: one row for each source that was not as noted
CREATE OR REPLACE FUNCTION listener.repair_capture() RETURNS TABLE (source text, outcome text, detail text)
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $function$
#variable_conflict use_column
DECLARE
    here listener.installation;
    elsewhere boolean;
    known listener.source;
    attempts integer := 5;
BEGIN
    IF NOT pg_try_advisory_xact_lock(listener.lock_key(0, 'registration')) THEN
        RETURN;
    END IF;
    SELECT i.* INTO here FROM listener.installation i;
    elsewhere := (here.system_identifier, here.database_oid) IS DISTINCT FROM (
        (SELECT c.system_identifier FROM pg_control_system() c),
        (SELECT d.oid FROM pg_database d WHERE d.datname = current_database()));
    IF elsewhere THEN
        UPDATE listener.installation SET
            system_identifier = (SELECT c.system_identifier FROM pg_control_system() c),
            database_oid = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database());
        UPDATE listener.source s SET relid = coalesce(to_regclass(format('%I.%I', s.schema_name, s.table_name)), 0);
        -- What was noted there means nothing here, and its numbers may be those of other tables.
        DELETE FROM listener.source_table;
    END IF;
    FOR known IN
        SELECT s.* FROM listener.source s WHERE NOT s.capture_paused AND (
            elsewhere
            OR NOT EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                           WHERE c.oid = s.relid AND c.relname = s.table_name AND n.nspname = s.schema_name)
            OR (s.tenant_column IS NOT NULL AND NOT EXISTS (
                    SELECT FROM pg_attribute a WHERE a.attrelid = s.relid AND a.attname = s.tenant_column
                      AND a.attnum = listener.tracked_column(s.id)))
            OR (s.through_id IS NOT NULL AND (
                    s.through_keys IS DISTINCT FROM listener.tracked_names(s.through_keys, 'key_of_' || s.id)
                    OR s.through_references IS DISTINCT FROM listener.tracked_names(s.through_references, 'reference_of_' || s.id)
                    OR to_regclass('listener.lookup_' || s.id) IS NULL
                    OR (s.through_cascades AND NOT listener.still_cascades(s.id))))
            OR EXISTS (
                SELECT FROM listener.capture_tables(s.relid) w
                FULL JOIN (SELECT t.* FROM listener.source_table t WHERE t.source_id = s.id) t ON t.relid = w.relation
                WHERE w.relation IS NULL OR t.relid IS NULL
                   OR t.fingerprint IS DISTINCT FROM listener.capture_state(s.id, w.relation))
            OR EXISTS (
                SELECT FROM listener.wanted_triggers(s.id) w
                WHERE NOT EXISTS (SELECT FROM pg_trigger g WHERE g.tgrelid = w.relation AND g.tgname = w.name
                                    AND g.tgenabled = w.enabled)))
        ORDER BY s.id
    LOOP
        source := format('%s.%s', known.schema_name, known.table_name);
        BEGIN
            SELECT r.outcome, r.detail INTO outcome, detail FROM listener.repair_source(known, attempts) r;
            CONTINUE WHEN outcome IS NULL;
        EXCEPTION WHEN OTHERS THEN
            outcome := 'failed';
            detail := SQLERRM;
        END;
        RETURN NEXT;
        -- The locks on the tables of a mended source are held to the end. A writer may wait for one of them and hold
        -- what the next source needs: do not wait for him long, or he is the victim of a deadlock. There is a next sweep.
        EXIT WHEN outcome = 'failed' AND attempts = 1;
        IF outcome = 'repaired' THEN
            attempts := 1;
        END IF;
    END LOOP;
END
$function$;

-- tracked_column(source_id): the number of the tenant column that capture reads, whatever it is called now; NULL where
-- it was dropped.
CREATE OR REPLACE FUNCTION listener.tracked_column(source_id integer) RETURNS smallint
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT t.attnum FROM listener.tracked('tenant_of_' || $1) t
$function$;

-- still_cascades(source_id): whether a foreign key still deletes a look-up's rows with those that they belong to.
CREATE OR REPLACE FUNCTION listener.still_cascades(source_id integer) RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT EXISTS (
        SELECT FROM listener.source s JOIN listener.source t ON t.id = s.through_id
        JOIN pg_constraint c ON c.contype = 'f' AND c.conrelid = s.relid AND c.confrelid = t.relid
        WHERE s.id = $1 AND c.confdeltype = 'c' AND NOT c.condeferrable AND c.convalidated)
$function$;

-- repair_source(known, attempts): mends one source, trying so many times to get the locks on its tables; the outcome is
-- NULL where there is nothing to mend it with.
CREATE OR REPLACE FUNCTION listener.repair_source(
    known listener.source, attempts integer, OUT outcome text, OUT detail text)
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    source listener.source := known;
    column_now name;
    followed boolean;
    before text := (SELECT string_agg(concat(t.relid, t.fingerprint), ' ' ORDER BY t.relid)
                    FROM listener.source_table t WHERE t.source_id = known.id);
    seen text;
BEGIN
    IF NOT EXISTS (SELECT FROM pg_class c WHERE c.oid = source.relid) THEN
        source.relid := to_regclass(format('%I.%I', source.schema_name, source.table_name));
        IF source.relid IS NULL THEN
            RETURN;  -- readiness() says so
        END IF;
    END IF;
    SELECT n.nspname, c.relname INTO source.schema_name, source.table_name
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = source.relid;
    SELECT a.attname INTO column_now FROM pg_attribute a
    WHERE a.attrelid = source.relid AND a.attnum = listener.tracked_column(source.id) AND NOT a.attisdropped;
    followed := column_now IS NOT NULL OR source.tenant_column IS NULL;
    IF column_now IS NULL AND source.tenant_column IS NOT NULL THEN
        SELECT a.attname INTO column_now FROM pg_attribute a
        WHERE a.attrelid = source.relid AND a.attname = source.tenant_column AND NOT a.attisdropped;
    END IF;
    IF column_now IS NULL AND source.tenant_column IS NOT NULL AND source.relid = known.relid
       AND before = (SELECT string_agg(concat(t.oid::oid, listener.capture_state(known.id, t.oid)), ' ' ORDER BY t.oid::oid)
                     FROM (SELECT c.relation FROM listener.capture_tables(known.relid) c) AS t (oid)) THEN
        RETURN;  -- the column is gone, and readiness() says so
    END IF;
    source.tenant_column := coalesce(column_now, source.tenant_column);
    -- Two tables may have exchanged their names; the other source's turn comes.
    UPDATE listener.source s SET table_name = s.relid::text
    WHERE s.relid <> source.relid AND s.schema_name = source.schema_name AND s.table_name = source.table_name
      AND EXISTS (SELECT FROM pg_class c WHERE c.oid = s.relid);
    source.through_keys := listener.tracked_names(source.through_keys, 'key_of_' || source.id);
    source.through_references := listener.tracked_names(source.through_references, 'reference_of_' || source.id);
    source.through_cascades := source.through_cascades AND listener.still_cascades(source.id);
    UPDATE listener.source s SET
        (schema_name, table_name, relid, tenant_column, through_keys, through_references, through_cascades) = (
        SELECT source.schema_name, source.table_name, source.relid, source.tenant_column, source.through_keys,
               source.through_references, source.through_cascades)
    WHERE s.id = source.id;
    IF source.relid <> known.relid THEN
        PERFORM listener.check_source(source.relid::regclass, source.tenant_column);
    END IF;
    IF source.through_id IS NOT NULL AND to_regclass('listener.lookup_' || source.id) IS NULL THEN
        PERFORM listener.create_lookup(source.id);
    END IF;
    PERFORM listener.generate_capture(source.id);
    PERFORM listener.attach_capture(ARRAY[source.id], attempts);
    seen := (SELECT string_agg(concat(t.relid, t.fingerprint), ' ' ORDER BY t.relid)
             FROM listener.source_table t WHERE t.source_id = source.id);
    detail := format('%I.%I', source.schema_name, source.table_name)
              || coalesce(', tenant column ' || quote_ident(source.tenant_column), '');
    IF seen IS NOT DISTINCT FROM before AND source.relid = known.relid AND followed
       AND source.through_cascades IS NOT DISTINCT FROM known.through_cascades THEN
        IF (source.schema_name, source.table_name, source.tenant_column, source.through_keys, source.through_references)
               IS DISTINCT FROM
               (known.schema_name, known.table_name, known.tenant_column, known.through_keys, known.through_references) THEN
            outcome := 'renamed';
        END IF;
        RETURN;
    END IF;
    outcome := 'repaired';
    INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
    VALUES (pg_current_xact_id(), clock_timestamp(), source.id, '');
    PERFORM listener.ring_for_all();
END
$function$;

-- renew_capture(relation): makes the capture functions and triggers of a table anew, and marks every tenant of the views
-- that read it dirty: nobody knows what was missed. Raises LSN03 where the table is no source.
CREATE OR REPLACE FUNCTION listener.renew_capture(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    previous_role text := listener.become_owner();
    found_ids integer[] := ARRAY(SELECT s.id FROM listener.source s WHERE s.relid = relation ORDER BY s.id);
BEGIN
    PERFORM listener.lock_registration();
    IF found_ids = '{}' THEN
        RAISE EXCEPTION '% is no source', relation USING ERRCODE = 'LSN03';
    END IF;
    PERFORM listener.generate_capture(s) FROM unnest(found_ids) s;
    PERFORM listener.attach_capture(found_ids);
    INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
    SELECT pg_current_xact_id(), clock_timestamp(), s, '' FROM unnest(found_ids) s;
    PERFORM listener.ring_for_all();
    PERFORM set_config('role', previous_role, true);
END
$function$;
