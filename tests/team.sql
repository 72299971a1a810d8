-- A team whose code tries to take rights wherever it is called: see test_rights.py.
DO $$ BEGIN
    IF to_regrole('team') IS NULL THEN CREATE ROLE team LOGIN; END IF;
    IF to_regrole('rights_admin') IS NULL THEN CREATE ROLE rights_admin LOGIN; END IF;
    ALTER ROLE team NOSUPERUSER;
END $$;
GRANT listener_owner, team TO rights_admin;
GRANT team TO listener_owner;
CREATE SCHEMA team AUTHORIZATION team;
GRANT USAGE ON SCHEMA team TO PUBLIC;
GRANT CREATE ON SCHEMA team TO listener_owner;
CREATE TABLE public.other_sources (tenant_id text NOT NULL, secret text);
INSERT INTO public.other_sources VALUES ('t1', 'of another team');
SET ROLE team;
CREATE SEQUENCE team.ran;
CREATE SEQUENCE team.broken;
GRANT ALL ON SEQUENCE team.ran, team.broken TO PUBLIC;
CREATE TABLE team.sales (tenant_id text NOT NULL, v int NOT NULL);
CREATE INDEX ON team.sales (tenant_id);
CREATE TABLE team.tenants (id text PRIMARY KEY);
INSERT INTO team.tenants VALUES ('t1'), ('t2');
INSERT INTO team.sales VALUES ('t1', 1), ('t1', 2), ('t2', 3);
GRANT SELECT ON team.sales, team.tenants TO listener_service;
CREATE FUNCTION team.attack() RETURNS void LANGUAGE plpgsql VOLATILE AS $attack$
DECLARE
    attempt text;
BEGIN
    PERFORM pg_catalog.nextval('team.ran');
    IF current_user NOT IN ('team', 'listener_compute', 'listener_service') THEN
        PERFORM pg_catalog.nextval('team.broken');
        RAISE WARNING 'the code of team runs as %', current_user;
    END IF;
    FOREACH attempt IN ARRAY ARRAY[
        $$ SELECT pg_catalog.set_config('role', session_user, true) $$,
        $$ SELECT pg_catalog.set_config('role', 'none', false) $$,
        $$ SET SESSION AUTHORIZATION DEFAULT $$,
        $$ ALTER ROLE team SUPERUSER $$,
        $$ GRANT listener_owner TO team $$,
        $$ ALTER FUNCTION listener.compare(text, text) SECURITY INVOKER $$,
        $$ ALTER FUNCTION listener.refresh(text, text) SECURITY INVOKER $$,
        $$ ALTER FUNCTION listener_private.evaluate_1(text, text) SECURITY INVOKER $$,
        $$ ALTER FUNCTION listener_private.difference_1(text) SECURITY INVOKER $$,
        $$ SELECT pg_catalog.set_config('search_path', 'team, pg_catalog', false),
                  pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true) $$]
    LOOP
        BEGIN
            EXECUTE attempt;
            IF attempt !~ 'search_path' THEN
                PERFORM pg_catalog.nextval('team.broken');
                RAISE WARNING 'the code of team was let do this: %', attempt;
            END IF;
        EXCEPTION WHEN OTHERS THEN
            NULL;
        END;
    END LOOP;
END
$attack$;
-- Whoever calls an operator without its schema, and has team's in the path, calls this one.
CREATE FUNCTION team.same(text, text) RETURNS boolean LANGUAGE plpgsql AS
    $$ BEGIN PERFORM team.attack(); RETURN true; END $$;
CREATE OPERATOR team.= (leftarg = text, rightarg = text, function = team.same);
CREATE FUNCTION team.fee(v int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN PERFORM team.attack(); RETURN v * 2; END $$;
CREATE FUNCTION team.is_open(tenant text) RETURNS boolean LANGUAGE plpgsql STABLE AS
    $$ BEGIN PERFORM team.attack(); RETURN true; END $$;
CREATE FUNCTION team.plus(a int, b int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN PERFORM team.attack(); RETURN a + b; END $$;
CREATE OPERATOR team.## (leftarg = int, rightarg = int, function = team.plus);
CREATE TYPE team.cents AS (v int);
CREATE FUNCTION team.to_cents(v int) RETURNS team.cents LANGUAGE plpgsql IMMUTABLE AS
    $$ BEGIN PERFORM team.attack(); RETURN ROW(v)::team.cents; END $$;
CREATE CAST (int AS team.cents) WITH FUNCTION team.to_cents(int);
CREATE DOMAIN team.amount AS bigint CHECK (team.fee(1) = 2);
ALTER TABLE team.sales ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON team.sales USING (
    tenant_id = nullif(current_setting('app.current_tenant_id', true), '') AND team.is_open(tenant_id));
CREATE MATERIALIZED VIEW team.totals AS
    SELECT tenant_id, sum(((v OPERATOR(team.##) 1)::team.cents).v)::team.amount AS n, team.fee(3) AS fee
    FROM team.sales WHERE team.fee(1) = 2 GROUP BY tenant_id;
CREATE UNIQUE INDEX ON team.totals (tenant_id);
RESET ROLE;
