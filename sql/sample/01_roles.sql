-- The sample's roles. Load these files in order, as an administrator, after `listener roles` and `listener migrate`:
--   cat sql/sample/*.sql | psql "$ADMIN_URL"
--   listener_owner    owns every table; cannot log in           (made by `listener roles`)
--   listener_app      the application: writes its own tenant's rows
--   listener_service  reads the sources under row-level security (made by `listener roles`)
--   listener_reader   reads the dashboards                       (made by `listener roles`)
DO $roles$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'listener_app') THEN
        CREATE ROLE listener_app LOGIN;
    END IF;
END
$roles$;
GRANT CREATE, USAGE ON SCHEMA public TO listener_owner;
GRANT USAGE ON SCHEMA public TO listener_app, listener_service, listener_reader;
