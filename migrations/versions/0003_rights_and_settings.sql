-- compute_role: the role whose rights a definition is computed with. Of the installation: the role for all views that
-- name no other. It cannot log in, and it owns no function that it could name: sql/03_computing.sql says why that matters.
-- settings: the settings that the result of a view depends on, as they were at its registration (name -> value).
-- max_staleness: how old an unseen change of a key may get before an alert; NULL: the view has no limit.
ALTER TABLE listener.installation
    ADD COLUMN compute_role name,
    -- false: notifications carry neither tenant nor table
    ADD COLUMN notify_names boolean NOT NULL DEFAULT true;
UPDATE listener.installation SET compute_role = service_role;
ALTER TABLE listener.installation ALTER COLUMN compute_role SET NOT NULL;
ALTER TABLE listener.managed_view
    ADD COLUMN compute_role name,
    ADD COLUMN settings jsonb NOT NULL DEFAULT '{}',
    ADD COLUMN max_staleness interval CHECK (max_staleness > '0');
-- Views that exist have been computed under these constants until now, and under these settings of the server.
UPDATE listener.managed_view SET settings =
    '{"DateStyle": "ISO, YMD", "IntervalStyle": "postgres", "array_nulls": "on", "xmloption": "content", "xmlbinary": "base64",
      "quote_all_identifiers": "off", "backslash_quote": "safe_encoding", "transform_null_equals": "off",
      "timezone_abbreviations": "Default"}'::jsonb || (
    SELECT jsonb_object_agg(g.name, g.reset_val) FROM pg_catalog.pg_settings g
    WHERE g.name IN ('lc_monetary', 'lc_numeric', 'lc_time', 'default_text_search_config'));
-- What runs a team's code: see sql/03_computing.sql. Nobody but its owner may use it.
CREATE SCHEMA listener_private;

-- The functions as the last migration, or the registration of a view, made them; `listener doctor` compares.
CREATE TABLE listener.installed_function (
    signature text PRIMARY KEY,
    digest text NOT NULL
);
ALTER TABLE listener.installed_function REPLICA IDENTITY FULL;

-- Functions that have other results now, or are in listener_private: the files of sql/ make them again.
DROP FUNCTION IF EXISTS listener.refresh(text, bigint), listener.refresh(text, uuid), listener.refresh(text, text),
    listener.refresh_key(text, text), listener.refresh_dirty(integer, text, text, bigint),
    listener.explained(text, text), listener.make_stand_ins(regclass, text), listener.tenant_plans(regclass, name, text),
    listener.forget_rows(text, text), listener.check_one_select(text, text, text, text), listener.check_readable(regclass),
    listener.make_definition(integer, text, text, boolean), listener.make_tenants(integer, text, text),
    listener.create_definition(integer, text, text, text),
    listener.grant_definition(integer),
    listener.record_refresh(integer, text, bigint, timestamptz, bigint, bigint, bigint, text);
DROP FUNCTION IF EXISTS listener.create_view(
    text, text, name[], name, text, regclass[], interval, interval, text, interval, text, boolean);
DROP FUNCTION IF EXISTS listener.set_window(text, interval, interval, text, interval, boolean);
DROP FUNCTION IF EXISTS listener.check_window(interval, interval, text, interval, text);
DROP FUNCTION IF EXISTS listener.explain_key(text, text);
DO $difference$
DECLARE
    routine regprocedure;
BEGIN
    FOR routine IN SELECT p.oid FROM pg_catalog.pg_proc p
                   WHERE p.pronamespace = 'listener'::regnamespace AND p.proname ~ '^difference_[0-9]+$' LOOP
        EXECUTE format('DROP FUNCTION %s', routine);
    END LOOP;
END
$difference$;
-- Nothing calls it any more.
DROP FUNCTION IF EXISTS listener.row_shape(oid);
-- What these return is another row.
DROP FUNCTION IF EXISTS listener.uncast(text);
DROP FUNCTION IF EXISTS listener.equalities(text, text);
DROP FUNCTION IF EXISTS listener.implied(jsonb, text);

-- The view that holds the query of a materialized view which is made again, where that query shows the owner no rows.
ALTER TABLE listener.adoption ADD COLUMN query_view name;
-- They have an argument more now, `owner`.
DROP FUNCTION IF EXISTS listener.carried(regclass, text, "char", name[], jsonb, jsonb);
DROP FUNCTION IF EXISTS listener.begin_adoption(text, name[], name, text, regclass[], interval, interval, text, interval, text, boolean, text);
DROP FUNCTION IF EXISTS listener.plan_adoption(text, name[], name, text);
DROP FUNCTION IF EXISTS listener.unadopting(listener.managed_view, listener.adoption);
DROP FUNCTION IF EXISTS listener.whole_digests(text);
-- drift_version: what a key showed when check_drift() last had it refreshed, since nothing explained how it differed.
-- undetermined_version: the same where it differed again with no change in between: its definition has more than one right result.
ALTER TABLE listener.refresh_state
    ADD COLUMN drift_version bigint,
    ADD COLUMN undetermined_version bigint;
