-- Looking up views, tenants and roles by the names that callers use.
--
-- Errors of this schema carry SQLSTATEs of their own, so that a caller can tell them apart without reading messages:
--   LSN01  unknown view            LSN02  validation error: tenant missing or malformed, or a wrong argument
--   LSN03  refused: the definition or the set-up does not allow it (the message says what, the hint how to fix it)
--   LSN04  the definition returns two rows with one key
--   LSN05  the transaction's isolation level is not READ COMMITTED
--   LSN06  the caller's release is too old for this schema

-- find_view(view_name): the managed view of that name, as it was registered or as SQL takes its target's name. One without
-- a schema is enough where it is unique.
-- Reads managed_view. Raises LSN01.
CREATE OR REPLACE FUNCTION listener.find_view(view_name text) RETURNS listener.managed_view
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp SET plan_cache_mode = auto AS $function$
DECLARE
    found listener.managed_view;
    parts text[];
BEGIN
    SELECT v.* INTO found FROM listener.managed_view v WHERE v.name = view_name;
    IF found.id IS NULL THEN
        SELECT v.* INTO found FROM listener.managed_view v
        WHERE view_name IN (v.target_schema || '.' || v.target_name,
                            quote_ident(v.target_schema) || '.' || quote_ident(v.target_name), quote_ident(v.target_name));
    END IF;
    IF found.id IS NULL THEN
        -- In quotes that it does not need, or in capital letters.
        BEGIN
            parts := parse_ident(view_name);
        EXCEPTION WHEN OTHERS THEN
            parts := NULL;  -- it is no name at all
        END;
        SELECT v.* INTO found FROM listener.managed_view v
        WHERE parts IN (ARRAY[v.target_schema, v.target_name]::text[], ARRAY[v.target_name]::text[]);
    END IF;
    IF found.id IS NULL THEN
        RAISE EXCEPTION 'there is no managed view %', coalesce(quote_literal(view_name), 'NULL')
            USING ERRCODE = 'LSN01',
                  HINT = coalesce('Managed views: ' || (SELECT string_agg(v.name, ', ' ORDER BY v.name)
                                                        FROM listener.managed_view v) || '.',
                                  'No view is registered yet: see listener.create_view.');
    END IF;
    RETURN found;
END
$function$;

-- canonical_tenant(tenant, tenant_type): the tenant as the type's output function writes it, so that one tenant is
-- one key however it was spelled; '' where the view has no tenants (tenant_type NULL) and so one key. Raises LSN02
-- where it is missing, longer than 1,024 bytes or not of the type.
CREATE OR REPLACE FUNCTION listener.canonical_tenant(tenant text, tenant_type text) RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF tenant_type IS NULL THEN
        RETURN '';
    END IF;
    IF tenant IS NULL OR tenant = '' THEN
        RAISE EXCEPTION 'validation_error: the tenant is missing'
            USING ERRCODE = 'LSN02', HINT = 'Give a tenant of type ' || tenant_type || '.';
    END IF;
    IF octet_length(tenant) > 1024 THEN
        RAISE EXCEPTION 'validation_error: the tenant is % bytes long, more than 1024', octet_length(tenant)
            USING ERRCODE = 'LSN02';
    END IF;
    CASE tenant_type
        WHEN 'uuid' THEN RETURN tenant::uuid::text;
        WHEN 'bigint' THEN RETURN tenant::bigint::text;
        WHEN 'integer' THEN RETURN tenant::integer::text;
        ELSE RETURN tenant;
    END CASE;
EXCEPTION WHEN invalid_text_representation OR numeric_value_out_of_range THEN
    RAISE EXCEPTION 'validation_error: % is no tenant of type %', quote_literal(left(tenant, 100)), tenant_type
        USING ERRCODE = 'LSN02';
END
$function$;

-- become_owner(): sets the role to the one that owns this schema, for the rest of the transaction or until
-- set_config('role', <result>, true); returns the role setting that was in force. Definitions, triggers and targets
-- so have one owner, whoever registers them. Raises LSN03 where the caller may not.
CREATE OR REPLACE FUNCTION listener.become_owner() RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    owner_role name;
    previous text := pg_catalog.current_setting('role');
BEGIN
    SELECT i.owner_role INTO owner_role FROM listener.installation i;
    IF pg_catalog.current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'this needs a READ COMMITTED transaction, not %',
            pg_catalog.upper(pg_catalog.current_setting('transaction_isolation')) USING ERRCODE = 'LSN05';
    END IF;
    IF current_user <> owner_role THEN
        IF NOT pg_catalog.pg_has_role(current_user, owner_role, 'MEMBER') THEN
            RAISE EXCEPTION 'role % may not change what the schema listener manages', current_user
                USING ERRCODE = 'LSN03',
                      HINT = pg_catalog.format('Run it as %I, or: GRANT %I TO %I.', owner_role, owner_role, current_user);
        END IF;
        PERFORM pg_catalog.set_config('role', owner_role, true);
    END IF;
    RETURN previous;
END
$function$;

-- is_administrator(): whether the user of the session administers this schema: a superuser, or a member of its owner
-- other than the service.
CREATE OR REPLACE FUNCTION listener.is_administrator() RETURNS boolean
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT r.rolsuper OR (session_user <> i.service_role AND pg_has_role(session_user, i.owner_role, 'MEMBER'))
    FROM pg_roles r CROSS JOIN listener.installation i WHERE r.rolname = session_user
$function$;

-- serves(migration): whether a service whose newest migration is this one may work on this schema, even if the schema is
-- newer. The bound is raised by the migration that makes the files here do what an older service cannot live with:
-- docs/operations.md, "Upgrading", says what that is. Migrations are numbered, so their names have an order.
CREATE OR REPLACE FUNCTION listener.serves(migration text) RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    SELECT migration >= '0001' COLLATE "C"
$function$;

-- check_caller(what): raises LSN05 in any isolation level but READ COMMITTED: drain and refresh rest on each statement
-- having a snapshot of its own; and LSN06 where the session says, in listener.migration, that it is of a release which
-- this schema does not serve. That holds from the commit of the migration on, and for services that run meanwhile.
CREATE OR REPLACE FUNCTION listener.check_caller(what text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $function$
BEGIN
    IF NOT listener.serves(nullif(current_setting('listener.migration', true), '')) THEN
        RAISE EXCEPTION 'the schema is at migration % and no longer serves a release of %',
            (SELECT a.version_num FROM listener.alembic_version a), current_setting('listener.migration')
            USING ERRCODE = 'LSN06', HINT = 'Upgrade this service.';
    END IF;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION '% needs a READ COMMITTED transaction, not %',
            what, upper(current_setting('transaction_isolation'))
            USING ERRCODE = 'LSN05', HINT = 'BEGIN ISOLATION LEVEL READ COMMITTED.';
    END IF;
END
$function$;

-- lock_key(view_id, tenant): the 64-bit advisory lock of a refresh key; lock_key(0, '') is the drain's.
CREATE OR REPLACE FUNCTION listener.lock_key(view_id integer, tenant text) RETURNS bigint
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $function$
    SELECT pg_catalog.hashtextextended(
        'listener:' OPERATOR(pg_catalog.||) view_id::pg_catalog.text OPERATOR(pg_catalog.||) ':' OPERATOR(pg_catalog.||) tenant, 0)
$function$;
