-- The roles that compute views: which one a view has, and which may be one. See 03_computing.sql for what they are for.

-- compute_role_of(view): the role that computes a view: its own, or that of the installation.
CREATE OR REPLACE FUNCTION listener.compute_role_of(view listener.managed_view) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(view.compute_role, i.compute_role) FROM listener.installation i
$function$;

-- grantee_of(view): the role that needs the grants for computing a view. The compute role of the installation has the
-- grants of the service, as its member; a view's own compute role needs each of them itself.
CREATE OR REPLACE FUNCTION listener.grantee_of(view listener.managed_view) RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT coalesce(view.compute_role, i.service_role) FROM listener.installation i
$function$;

-- check_compute_role(role): raises LSN03 where this role should not compute a view. It must not log in, bypass
-- row-level security or make roles. It must be no member of the owner, the service or the installation's compute role,
-- whose rights reach every team. The owner of this schema must be its member, to give it the functions that compute.
-- NULL is right.
CREATE OR REPLACE FUNCTION listener.check_compute_role(role name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    installed listener.installation;
    known pg_roles;
    wrong text;
    hint text;
    apart text;
BEGIN
    IF role IS NULL THEN
        RETURN;
    END IF;
    SELECT i.* INTO installed FROM listener.installation i;
    apart := format('make a role for the team: CREATE ROLE team_compute NOLOGIN; GRANT team_compute TO %I;', installed.owner_role);
    SELECT r.* INTO known FROM pg_roles r WHERE r.rolname = role;
    SELECT w.wrong, w.hint INTO wrong, hint
    FROM (VALUES
        (1, known.oid IS NULL, 'there is no such role',
         format('CREATE ROLE %1$I NOLOGIN; GRANT %1$I TO %2$I;', role, installed.owner_role)),
        -- Somebody may need what this role has.
        (2, known.rolsuper, 'it is a superuser', 'Name another role, or ' || apart),
        (3, known.rolbypassrls, 'row-level security does not bind it', format('ALTER ROLE %I NOBYPASSRLS;', role)),
        (4, known.rolcanlogin, 'it may log in',
         format('ALTER ROLE %I NOLOGIN; or, if somebody logs in as it, %s', role, apart)),
        (5, known.rolcreaterole, 'it may make roles', format('ALTER ROLE %I NOCREATEROLE;', role))) AS w (ord, is_so, wrong, hint)
    WHERE w.is_so ORDER BY w.ord LIMIT 1;
    IF role IN (installed.owner_role, installed.service_role, installed.compute_role) THEN
        wrong := 'it is a role of the installation';
        hint := 'Leave it out, or ' || apart;
    ELSIF wrong IS NULL THEN
        SELECT format('it is a member of %I', m.other), format('REVOKE %I FROM %I;', m.other, role) INTO wrong, hint
        FROM unnest(ARRAY[installed.owner_role, installed.service_role, installed.compute_role]) AS m (other)
        WHERE pg_has_role(role, m.other, 'MEMBER') LIMIT 1;
    END IF;
    IF wrong IS NULL AND NOT pg_has_role(installed.owner_role, role, 'MEMBER') THEN
        wrong := format('%I is no member of it', installed.owner_role);
        hint := format('GRANT %I TO %I;', role, installed.owner_role);
    END IF;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION 'role % cannot compute a view: %', role, wrong USING ERRCODE = 'LSN03', HINT = hint;
    END IF;
END
$function$;

-- check_lookups_apart(isolates, looks_up): raises LSN03 where a view has a compute role of its own, or is to get one, and
-- capture looks tenants up, or is to. A look-up may run the policies of the table that it reads with the rights of the
-- owner of this schema, which reach every team. With BYPASSRLS the owner runs no policy.
CREATE OR REPLACE FUNCTION listener.check_lookups_apart(isolates boolean, looks_up boolean) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    owner_role name := (SELECT i.owner_role FROM listener.installation i);
    isolated text := (SELECT min(v.name) FROM listener.managed_view v WHERE v.compute_role IS NOT NULL);
    looked_up text := (SELECT min(format('%I.%I', s.schema_name, s.table_name)) FROM listener.source s WHERE s.through_id IS NOT NULL);
BEGIN
    IF (isolates OR isolated IS NOT NULL) AND (looks_up OR looked_up IS NOT NULL)
       AND NOT (SELECT r.rolsuper OR r.rolbypassrls FROM pg_roles r WHERE r.rolname = owner_role) THEN
        RAISE EXCEPTION 'teams are not kept apart: capture finds the tenants of % by a look-up, which may run the policies of any team with the rights of %',
            coalesce(looked_up, 'this table'), owner_role
            USING ERRCODE = 'LSN03', HINT = format('ALTER ROLE %I BYPASSRLS: then a look-up runs no policy. Or %s.', owner_role,
                CASE WHEN isolates THEN 'leave out compute_role' ELSE format('SELECT listener.set_compute_role(%L, NULL)', isolated) END);
    END IF;
END
$function$;
