-- Run once by an administrator (a superuser, or a role with CREATEROLE that owns the database), then: listener migrate
--
--   owner     owns the schema listener, the definitions and the targets; cannot log in; the role that migrates is a
--             member
--   service   what `listener run` logs in as: reads the sources under row-level security, writes only the targets
--   compute   computes the definitions: has the service's rights and cannot log in
--   reader    reads targets
-- No password is set here. Set one by \password in psql, or let pg_hba.conf authenticate the service another way.
DO $roles$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {owner_name}) THEN
        CREATE ROLE {owner} NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {service_name}) THEN
        CREATE ROLE {service} LOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {compute_name}) THEN
        CREATE ROLE {compute} NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'listener_reader') THEN
        CREATE ROLE listener_reader NOLOGIN;
    END IF;
END
$roles$;
-- So that the owner can give the functions that compute to the compute role; and so that you, who run this, may
-- migrate. From PostgreSQL 16 on, the role that grants a role must have made it, or have its ADMIN option.
DO $members$
BEGIN
    IF {owner_name} <> {service_name} THEN
        GRANT {service} TO {owner};
    END IF;
    IF {compute_name} NOT IN ({owner_name}, {service_name}) THEN
        GRANT {service} TO {compute};
        GRANT {compute} TO {owner};
    END IF;
    IF {owner_name} <> current_user THEN
        GRANT {owner} TO CURRENT_USER;
    END IF;
END
$members$;
GRANT CREATE ON DATABASE {database} TO {owner};
GRANT TEMPORARY ON DATABASE {database} TO {compute};
-- So that the service sees who holds a lock or an old snapshot. The one thing here that may need more than an administrator
-- has: from PostgreSQL 16 on the ADMIN option of pg_read_all_stats, which a superuser has. Without it two metrics say less, and
-- so do `listener explain` and `listener doctor`; nothing is refreshed later or otherwise.
DO $statistics$
BEGIN
    GRANT pg_read_all_stats TO {service};
EXCEPTION WHEN insufficient_privilege THEN
    RAISE NOTICE '% may not grant pg_read_all_stats', current_user;
END
$statistics$;

-- Then let the owner put triggers on the sources, and the service read them (as the sources' owner):
--   GRANT <the role that owns the tables> TO {owner};
--   GRANT USAGE, CREATE ON SCHEMA <schema of the targets> TO {owner};
--   GRANT USAGE ON SCHEMA <schema> TO {service};
--   GRANT SELECT ON <each source> TO {service};
