-- Undoes 0001 and sql/: triggers, definitions, functions, views, tables. Targets stay as plain tables, unless the
-- setting listener.drop_targets is 'true'.
DO $drop$
DECLARE
    name text;
BEGIN
    PERFORM listener.uninstall(current_setting('listener.drop_targets')::boolean);
    FOR name IN SELECT c.oid::regclass::text FROM pg_class c
                WHERE c.relnamespace = 'listener'::regnamespace AND c.relkind = 'v' LOOP
        EXECUTE format('DROP VIEW IF EXISTS %s CASCADE', name);
    END LOOP;
    -- The tables before the functions: find_view() and others return the row type of a table.
    FOR name IN SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                WHERE n.nspname = 'listener' AND c.relkind = 'r' AND c.relowner = n.nspowner
                  AND c.relname <> 'alembic_version' LOOP
        EXECUTE format('DROP TABLE %s CASCADE', name);
    END LOOP;
    DROP SEQUENCE listener.doorbell;
    DROP SCHEMA IF EXISTS listener_private CASCADE;
    FOR name IN SELECT p.oid::regprocedure::text FROM pg_proc p WHERE p.pronamespace = 'listener'::regnamespace LOOP
        EXECUTE format('DROP FUNCTION %s', name);
    END LOOP;
END
$drop$;
