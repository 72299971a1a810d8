-- The setting app.current_tenant_id, in the session that calls.
--
-- PostgreSQL cannot make such a setting unset again. Once it was set in a session, even in a transaction that was
-- rolled back, it is '' afterwards; RESET and DISCARD ALL give '', too. A policy that casts it, and expects NULL where
-- no tenant was named, raises an error from then on, since ''::uuid is no uuid. So a session that had named no tenant
-- is left with a tenant that does not exist. This does not survive a rollback of the transaction, nor DISCARD ALL: both
-- leave ''. There only the policy itself (nullif(…, '')), or a value for the role (ALTER ROLE … SET
-- app.current_tenant_id), helps. `listener doctor` names such policies.

-- raising_policies(): the policies that raise an error where the setting is '', and none where it is unset.
--   type     the type to which they cast the setting
--   mended   USING and WITH CHECK as they should be; NULL where a function of the policy has the cast
CREATE OR REPLACE FUNCTION listener.raising_policies()
    RETURNS TABLE (relation regclass, policy name, type text, mended text)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp SET standard_conforming_strings = on AS $function$
    WITH pattern (cast_of) AS (
        VALUES ('(current_setting\(''app\.current_tenant_id''(?:::text)?,\s*true\))(\)*(?:\s*::\s*|\s+as\s+))(uuid|bigint|integer|smallint|numeric|int\d?)\M')
    ), policy AS (
        SELECT p.oid, p.polrelid, p.polname, pg_get_expr(p.polqual, p.polrelid) AS qual,
            pg_get_expr(p.polwithcheck, p.polrelid) AS checked
        FROM pg_policy p
        WHERE concat(p.polqual, p.polwithcheck) ~ ':funcid 3294\M'
           OR EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_policy'::regclass AND d.objid = p.oid
               AND d.refclassid = 'pg_proc'::regclass)
    )
    SELECT p.polrelid::regclass, p.polname, lower(f.found[3]),
           CASE WHEN f.own THEN concat_ws(
               ' ', 'USING (' || regexp_replace(p.qual, t.cast_of, 'nullif(\1, '''')\2\3', 'gi') || ')',
               'WITH CHECK (' || regexp_replace(p.checked, t.cast_of, 'nullif(\1, '''')\2\3', 'gi') || ')') END
    FROM policy p CROSS JOIN pattern t
    CROSS JOIN LATERAL (
        SELECT regexp_match(concat_ws(' ', p.qual, p.checked), t.cast_of, 'i') AS found, true AS own
        UNION ALL
        SELECT regexp_match(coalesce(pg_get_function_sqlbody(r.oid), r.prosrc), t.cast_of, 'i'), false
        FROM pg_depend d JOIN pg_proc r ON r.oid = d.refobjid
        WHERE d.classid = 'pg_policy'::regclass AND d.objid = p.oid AND d.refclassid = 'pg_proc'::regclass
        ORDER BY 2 DESC) f
    WHERE f.found IS NOT NULL
$function$;

-- nobody(type): the text of a tenant of this type that does not exist.
CREATE OR REPLACE FUNCTION listener.nobody(type text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $function$
    -- 'listener', and a version that no generator makes: the nil uuid is somebody's default tenant.
    SELECT CASE WHEN type IN ('uuid', 'text') THEN '6c697374-656e-8572-8000-000000000000' WHEN type = 'smallint' THEN '-32768'
                ELSE '-2147483648' END
$function$;

-- give_back_tenant(callers_tenant): sets app.current_tenant_id to what the caller had, for the rest of the transaction.
-- Where the caller had none, it becomes ''; or, where a policy would raise an error on that, for the session, a tenant
-- that does not exist. In the service's own sessions it always becomes ''.
CREATE OR REPLACE FUNCTION listener.give_back_tenant(callers_tenant text) RETURNS void
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, pg_temp AS $function$
DECLARE
    type text;
BEGIN
    IF current_setting('app.current_tenant_id', true) IS NOT DISTINCT FROM callers_tenant THEN
        RETURN;
    END IF;
    IF callers_tenant IS NULL AND session_user <> (SELECT i.service_role FROM listener.installation i) THEN
        SELECT r.type INTO type FROM listener.raising_policies() r GROUP BY r.type ORDER BY count(*) DESC, r.type LIMIT 1;
    END IF;
    PERFORM CASE WHEN type IS NULL THEN set_config('app.current_tenant_id', coalesce(callers_tenant, ''), true)
                 ELSE set_config('app.current_tenant_id', listener.nobody(type), false) END;
END
$function$;
