-- compute_role: the role whose rights a definition is computed with. Of the installation: the role for all views that
-- name no other. It cannot log in, and it owns no function that it could name: sql/10_compute.sql says why that matters.
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
-- The view that holds the query of a materialized view which is made again, where that query shows the owner no rows.
ALTER TABLE listener.adoption ADD COLUMN query_view name;
-- They have an argument more now, `owner`.
DROP FUNCTION IF EXISTS listener.carried(regclass, text, "char", name[], jsonb, jsonb);
DROP FUNCTION IF EXISTS listener.begin_adoption(text, name[], name, text, regclass[], interval, interval, text, interval, text, boolean, text);
DROP FUNCTION IF EXISTS listener.plan_adoption(text, name[], name, text);
