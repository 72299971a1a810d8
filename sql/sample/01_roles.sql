-- The roles of the sample. Run by an administrator, after `listener migrate`.
--   listener_owner     owns the tables and the targets; nobody logs in as it
--   listener_app       the application: writes the sources, one tenant a transaction
--   listener_service   `listener run`: reads the sources under row-level security and writes none of them
--   listener_reader    what dashboards are granted
-- `listener roles` prints three of them too: a role that exists is kept as it is.
DO $roles$
BEGIN
    IF to_regrole('listener_owner') IS NULL THEN
        CREATE ROLE listener_owner NOLOGIN;
    END IF;
    IF to_regrole('listener_app') IS NULL THEN
        CREATE ROLE listener_app LOGIN;
    END IF;
    IF to_regrole('listener_service') IS NULL THEN
        CREATE ROLE listener_service LOGIN;
    END IF;
    IF to_regrole('listener_reader') IS NULL THEN
        CREATE ROLE listener_reader NOLOGIN;
    END IF;
END
$roles$;

GRANT CREATE, USAGE ON SCHEMA public TO listener_owner;
GRANT USAGE ON SCHEMA public TO listener_app, listener_service, listener_reader;

-- The target behind public.mv_realtime_revenue lives here, so that the view can have the name that dashboards read.
CREATE SCHEMA dashboard AUTHORIZATION listener_owner;
SET ROLE listener_owner;
GRANT USAGE ON SCHEMA dashboard TO listener_service, listener_reader;
RESET ROLE;
